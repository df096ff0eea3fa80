"""The commands as a whole: each is in the help, closest names, experiments by name, completion, missing extras."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import odenets
import schemes
from cli.lines import answer, fails
from odenets import packaged
from odenets.cli import entry
from odenets.cli.entry import COMMANDS, HELP, LIGHTNING, main
from odenets.extras import EXTRAS

ROOT = Path(odenets.__file__).parents[1]
EVERY = sorted({*LIGHTNING, *COMMANDS})


def test_an_interruption_while_modules_are_imported_is_two_lines(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(entry, "_run", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["fit"])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 130 and len(lines) == 2 and lines[0] == "error: interrupted"


def test_every_command_is_in_the_help_and_has_a_parser_beside_its_function():
    for name, place in COMMANDS.items():
        assert re.search(rf"^  odenets {name}\b", HELP, re.M), name
        module, _, function = place.partition(":")
        found = importlib.import_module(module)
        assert callable(getattr(found, function))
        assert callable(getattr(found, re.sub("run|command", "parser", function)))
    assert all(re.search(rf"^  {name}\b", HELP, re.M) for name in LIGHTNING)


@pytest.mark.parametrize("name", sorted({*COMMANDS} - {"compare"}))
def test_help_says_how_a_command_is_used(capsys, name):
    with pytest.raises(SystemExit) as e:
        main([name, "--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0 and f"odenets {name}" in out


@pytest.mark.parametrize(
    ("typed", "meant"), [("model", "models"), ("FIT", "fit"), ("scheme", "schemes"), ("shwo", "show")]
)
def test_a_mistyped_command_names_commands(capsys, typed, meant):
    said = fails(capsys, typed, "--json")
    assert f"there is no {typed!r}; wanted one of fit, " in said and f"Closest: {meant}" in said
    assert all(name in said for name in EVERY)


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (["show", "RK4"], "rk4"),
        (["show", "nested(Midpoint, rk4)"], "midpoint"),
        (["models", "ResNet5O"], "resnet50"),
        (["models", "resnet20", "--scheme", "EULER"], "euler"),
        (["fit", "-c", "QuickStart"], "quickstart"),
        (["fit", "-c", "quikstart.yaml"], "quickstart"),
        (["study", "run", "-c", "studies/pilot_mni"], "studies/pilot_mini"),
        (["experiments", "QUIKSTART"], "quickstart"),
        (["fit", "-c", "quickstart", "--Trainer.Max_Epoch", "3"], "trainer.max_epochs"),
        (["convert", "x.pth", "--model", "ResNet50", "--output", "y.pth"], "resnet50"),
    ],
    ids=lambda v: "_".join(v) if isinstance(v, list) else "",
)
def test_capitals_do_not_hide_what_is_meant(capsys, tmp_path, monkeypatch, args, meant):
    monkeypatch.chdir(tmp_path)
    if args[0] == "convert":
        (tmp_path / "x.pth").write_bytes(b"")
        import torch

        torch.save({"a": torch.zeros(1)}, "x.pth")
    said = fails(capsys, *args, status=1 if args[0] in ("models", "experiments") and "--scheme" not in args else 2)
    assert meant in said.partition("  ")[2] or meant in said.split("losest")[1], said


def test_names_are_compared_in_one_place():
    """Else one of several ways to find what is closest would forget about capitals."""
    users = [
        str(path.relative_to(ROOT))
        for package in ("odenets", "schemes")
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"^\s*(?:import|from) difflib", path.read_text("utf-8"), re.M)
    ]
    assert users == ["schemes/spelling.py"]


def test_experiments_are_found_by_name_where_there_is_no_such_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = str(packaged.experiments()["quickstart"])
    for words in (["-c", "quickstart"], ["--config", "experiments/quickstart.yaml"], ["-c", "quickstart.yaml"]):
        assert packaged.with_files(["fit", *words]) == ["fit", words[0], file]
    assert packaged.with_files(["fit", "--config=quickstart", "-c", "{a: 1}"]) == [
        "fit",
        f"--config={file}",
        "-c",
        "{a: 1}",
    ]
    # A file of the user's wins, and a name that is an option's value stays.
    Path("quickstart").write_text("seed_everything: 1")
    assert packaged.with_files(["fit", "-c", "quickstart"]) == ["fit", "-c", "quickstart"]
    assert packaged.with_files(["fit", "--run_dir", "cifar10_resnet"])[-1] == "cifar10_resnet"
    with pytest.raises(SystemExit) as e:
        main(["fit", "-c", "cifar10_revcol", "--print_config"])
    assert e.value.code in (0, None) and "odenets.models.RevCol" in capsys.readouterr().out


def test_every_experiment_can_be_listed_and_printed(capsys):
    found = packaged.experiments()
    files = set(ROOT.glob("experiments/**/*.yaml"))
    assert set(found.values()) == files and {"quickstart", "studies/pilot_mini"} <= set(found)
    out, _ = answer(capsys, "experiments")
    assert all(name in out for name in found)
    assert answer(capsys, "experiments", "quickstart")[0] == found["quickstart"].read_text("utf-8")


def test_the_wheel_holds_every_experiment_where_it_is_looked_for():
    """By what the build is told; .ci/wheel builds it and trains from it."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    patterns = [text.removeprefix("/") for text in wheel["include"] if "experiments" in text]
    assert {p for text in patterns for p in ROOT.glob(text)} == set(packaged.experiments().values())
    (target,) = wheel["sources"].values()
    assert Path(packaged.__file__).parent / "experiments" == ROOT / target and set(wheel["sources"]) == {"experiments"}


def test_a_shell_completes_commands_options_and_names(capsys, tmp_path):
    script = tmp_path / "script"
    script.write_text(answer(capsys, "completion", "bash")[0])
    lines = {
        "odenets mo": {"models"},
        "odenets show rk": {name for name in schemes.names() if name.startswith("rk")},
        "odenets fit -c quicks": {"quickstart"},
        "odenets fit --trainer.max_ep": {"--trainer.max_epochs"},
        "odenets study re": {"report"},
        "odenets predict --ckpt_p": {"--ckpt_path"},
        "odenets predict --js": {"--json"},
        "odenets convert --model resnet2": {"resnet20", "resnet26"} & set(odenets.list_models("resnet2*")),
    }
    calls = "\n".join(
        f"COMP_WORDS=({line}); COMP_CWORD={len(line.split()) - 1}; COMPREPLY=(); _shtab_odenets; echo ${{COMPREPLY[@]}}"
        for line in lines
    )
    done = subprocess.run(["bash", "-c", f"source {script}\n{calls}"], capture_output=True, text=True, cwd=tmp_path)
    assert [set(line.split()) for line in done.stdout.splitlines()] == list(lines.values()), done.stderr


# In a process where only torch, einops and the standard library can be imported, one command after another.
BARE = """
import sys
sys.modules.update(dict.fromkeys({blocked}))  # None is what must not be imported
from odenets.cli import main
for line in {lines}:
    print("==", line, file=sys.stderr)
    try:
        main(line.split())
        code = 0
    except SystemExit as e:
        code = e.code
    print("-- status", code, file=sys.stderr)
"""
WORDS = {
    "analyse": "x.ckpt weights",
    "compare": "quickstart --over seed_everything=1,2 --dir runs",
    "completion": "bash",
    "convergence": "x.ckpt",
    "convert": "weights.pth --model resnet20 --output net.safetensors",
    "evaluate": "--ckpt_path x.ckpt",
    "export": "x.ckpt --output net.onnx",
    "predict": "--ckpt_path x.ckpt picture.png",
    "recipe": "revcol_tiny",
    "study": "run -c studies/pilot_mini",
    **dict.fromkeys(LIGHTNING, "-c quickstart"),
}
NEED_NOTHING = {"show": "rk4", "experiments": "quickstart", "models": "resnet20 --json", "schemes": "rk4 --json"}


@pytest.mark.long
def test_each_command_names_the_extra_that_it_lacks(tmp_path):
    """With nothing but the base installation; and what needs no extra runs."""
    import torch

    torch.save(odenets.create_model("resnet20").state_dict(), tmp_path / "weights.pth")
    lines = [f"{name} {words}" for name, words in WORDS.items()] + ["schemes rk4", "models vit*", "experiments"]
    lines += [f"{name} {words}" for name, words in NEED_NOTHING.items()]
    assert {line.split()[0] for line in lines} == set(EVERY), "a new command needs its words here"
    code = BARE.format(blocked=sorted(EXTRAS), lines=lines)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    blocks = re.findall(r"== (.+)\n((?:.*\n)*?)-- status (\S+)\n", done.stderr)
    assert [block[0] for block in blocks] == lines
    for line, said, status in blocks:
        if line in [f"{name} {words}" for name, words in NEED_NOTHING.items()]:
            assert (said, status) == ("", "0"), (line, said)
        else:
            assert status == "2" and len(said.splitlines()) == 2, (line, said)
            assert re.search(r'^  pip install "odenets\[\w+\]"$', said, re.M), (line, said)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.pth"]
