"""Kills a small training run with SIGKILL at random moments, resumes it each time, and compares its end bit by bit.

    python experiments/benchmarks/kills.py [--kills 20] [--processes 1] [--workers 2] [--seed 0]

The run has BatchNorm, dropout, stochastic depth, random crops, mixup, AdamW, a schedule, accumulated gradients and
averaged weights, and writes `last.ckpt` every three steps. Half of the kills come at a random time, half in the middle
of writing a file, at a random one of the calls that sync it, rename it or set its mode. The script prints how many of
the runs, each killed up to four times, ended with the weights, optimiser state and rows of metrics of an uninterrupted
run.
"""

import argparse
import csv
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from odenets.training.command import run

EPOCHS = 3
TIMES = ("train/images_per_s",)  # the one column that differs between any two runs


def write_config(folder: Path, workers: int = 0, pictures: int = 180, **trainer: Any) -> None:
    """Writes `c.yaml`, and pictures for it if workers are to decode them."""
    net = {"scheme": "midpoint", "functions": [2, 2], "widths": [4, 8], "placement": "preact", "stem": "conv3"}
    net |= {"drop_rate": 0.2, "drop_path_rate": 0.2}
    augment = {"crop": 1, "flip": 0.5, "mixup": 0.2}
    data = {"batch_size": 16, "augment": {"class_path": "odenets.training.Augment", "init_args": augment}}
    if workers:
        _write_pictures(folder / "pictures", pictures)
        data |= {"root": "pictures", "size": 12, "cache": False, "num_workers": workers}
    schedule = {"class_path": "odenets.training.WarmupCosine", "init_args": {"warmup": 1}}
    average = {"class_path": "odenets.training.MovingAverage", "init_args": {"decay": 0.9}}
    config = {
        **{"seed_everything": 3, "threads": 1, "run_dir": "run", "last": {"every_n_train_steps": 3}},
        "model": {
            "class_path": "odenets.training.Classifier",
            "init_args": {
                "net": {"class_path": "odenets.models.HOResNet", "init_args": net},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                "schedule": schedule,
            },
        },
        "data": {"class_path": f"odenets.training.{'Images' if workers else 'Digits'}", "init_args": data},
        "trainer": {
            **{"max_epochs": EPOCHS, "accelerator": "cpu", "accumulate_grad_batches": 2, "log_every_n_steps": 1},
            **{"limit_train_batches": 11, "limit_val_batches": 3, "deterministic": True, "callbacks": [average]},
            **{"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0},
            **trainer,
        },
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(config))


def _write_pictures(root: Path, count: int) -> None:
    from PIL import Image

    draw = random.Random(0)
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (root / name).mkdir(parents=True)
        for i in range(count if name.startswith("train") else 24):
            Image.frombytes("RGB", (14, 13), draw.randbytes(14 * 13 * 3)).save(root / name / f"{i}.png")


def start(folder: Path, *args: str, before: Callable[[], None] | None = None, command: str = "fit") -> int:
    """Starts a command line in a forked process with its own process group; returns its id."""
    sys.stdout.flush()
    if not (pid := os.fork()):
        os.setpgid(0, 0)
        code = 1
        try:
            os.chdir(folder)
            # The default of a new process, whatever the importing process has set.
            warnings.simplefilter("default")
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            if before is not None:
                before()
            run([command, "-c", "c.yaml", *args])
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid


def wait(pid: int) -> int:
    """Waits for a process of `start`, kills any processes it left, and returns its status."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    kill(pid)
    return code


def kill(pid: int) -> None:
    """Sends SIGKILL to a process and its children."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def die_while_writing(call: int) -> Callable[[], None]:
    """Makes a process kill itself at its n-th call that syncs, renames or changes the mode of a file."""

    def before() -> None:
        left = [call]

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return wrapper

        os.fsync, os.replace, os.chmod = counted(os.fsync), counted(os.replace), counted(os.chmod)

    return before


def resume_until_done(folder: Path, *args: str, kills: int, length: float, calls: int, draw: random.Random) -> int:
    """Kills a run up to `kills` times at random moments, resumes it each time, and returns the number of kills."""
    done = 0
    while True:
        resumed = ("--ckpt_path", "last") if (folder / "run/checkpoints/last.ckpt").exists() else ()
        in_a_write = done % 2 == 0
        before = die_while_writing(draw.randint(1, calls)) if in_a_write and done < kills else None
        pid = start(folder, *args, *resumed, before=before)
        if done < kills and not in_a_write:
            time.sleep(draw.uniform(0.2, 1) * length)
            kill(pid)
        code = wait(pid)
        if code == 0:
            return done
        gone = "another process of this run" in (folder / "err").read_text()[-300:]
        if code != -signal.SIGKILL and not gone:
            raise RuntimeError(f"status {code}: {(folder / 'err').read_text()[-2000:]}")
        done += 1


def state(folder: Path) -> dict[str, Any]:
    """Returns the final state of a run: its last checkpoint, and its rows of metrics in order."""
    held = torch.load(folder / "run/checkpoints/last.ckpt", map_location="cpu", weights_only=True)
    parts = [p for p in (folder / "run").glob("metrics*.csv") if "superseded" not in p.name]
    rows = []
    for part in sorted(parts, key=lambda p: (len(p.stem) == len("metrics"), int(p.stem.partition("-")[2] or 0))):
        with part.open() as lines:
            rows += [{k: v for k, v in row.items() if v and k not in TIMES} for row in csv.DictReader(lines)]
    names = ("state_dict", "optimizer_states", "lr_schedulers", "current_model_state", "averaging_state")
    return {**{name: held[name] for name in names if name in held}, "metrics": rows}


def differing(a: Any, b: Any, name: str = "") -> list[str]:
    """Returns the names at which two nested values are not bitwise equal."""
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and torch.equal(a, b) else [name]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [n for k in a for n in differing(a[k], b[k], f"{name}.{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [n for i, (x, y) in enumerate(zip(a, b, strict=True)) for n in differing(x, y, f"{name}.{i}")]
    return [] if a == b else [name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    draw, options = random.Random(args.seed), []
    if args.processes > 1:
        options = ["--trainer.devices", str(args.processes), "--trainer.strategy", "ddp_fork"]
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        whole.mkdir()
        write_config(whole, args.workers)
        began = time.monotonic()
        if code := wait(start(whole, *options)):
            sys.exit(f"status {code}: {(whole / 'err').read_text()[-2000:]}")
        length, want = time.monotonic() - began, state(whole)
        kills = equal = runs = 0
        while kills < args.kills:
            killed = Path(folder, f"killed{runs}")
            killed.mkdir()
            write_config(killed, args.workers)
            most = min(4, args.kills - kills)
            kills += resume_until_done(killed, *options, kills=most, length=length, calls=60, draw=draw)
            wrong = differing(want, state(killed))
            runs, equal = runs + 1, equal + (not wrong)
            print(f"{kills} kills: {'equal' if not wrong else f'{len(wrong)} differ: {wrong[:3]}'}", flush=True)
    print(f"{equal} of {runs} runs, killed {kills} times, ended as the one that was not ({length:.1f} s)")
    sys.exit(int(equal < runs))


if __name__ == "__main__":
    main()
