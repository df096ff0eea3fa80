"""Training by refinement, what the optimiser keeps, resuming, and the command that runs a checkpoint otherwise."""

import copy
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from odenets import ContinuousWeights, Stack
from odenets.cli import main
from odenets.continuous import fields_of
from odenets.rebuild import continuous_stacks
from odenets.training import Classifier, Refinement, analyse, convergence
from odenets.training.classifier import parameter_groups
from odenets.training.command import run as train
from odenets.training.files import open_checkpoint
from odenets.training.refinement import follow, refine_knots
from odenets.training.steps import as_trained
from odenets.training.trained import open_trained
from schemes import SchemeError

from .runs import ROOT
from .test_classifier import Random, pytestmark, sgd, trainer  # noqa: F401


def field(knots=2, degree=1):
    torch.manual_seed(0)
    return ContinuousWeights(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), knots, degree).double()


def net(knots=2, depth=2, scheme="euler"):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3), nn.SiLU())
    stack = Stack(ContinuousWeights(block, knots), scheme, depth, step="span/depth")
    return nn.Sequential(nn.Conv2d(1, 3, 1), stack, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))


OPTIMIZERS = {
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "adam": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.0, amsgrad=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.1, momentum=0.9),
}


def trained(kind, knots=2):
    f = field(knots)
    optimizer = OPTIMIZERS[kind](list(f.parameters()))
    x = torch.randn(7, 3, dtype=torch.float64)
    for k in range(3):
        optimizer.zero_grad()
        sum(f(t, x).square().sum() for t in (0.1, 0.4, 0.9 - 0.1 * k)).backward()
        optimizer.step()
    return f, optimizer


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_moments_follow_the_change_of_basis(kind):
    f, optimizer = trained(kind)
    before = {
        p: {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)} for p in f.parameters()
    }
    maps = refine_knots(f, 2)
    follow(optimizer, maps)
    (matrix,) = {id(m): m for m in maps.values()}.values()
    for p, state in before.items():
        for name, old in state.items():
            new = optimizer.state[p][name]
            if old.dim() == 0:
                assert new == old
                continue
            t = matrix**2 if "sq" in name or name == "square_avg" else matrix
            torch.testing.assert_close(new, torch.einsum("kj,j...->k...", t, old))
            assert new.shape == p.shape
    # Every optimiser can go on.
    f(0.3, torch.randn(2, 3, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in f.parameters())
    follow(optimizer, dict.fromkeys(f.parameters(), torch.eye(5, dtype=torch.float64)), "reset")
    assert all(v.abs().max() == 0 for p in f.parameters() for v in optimizer.state[p].values() if v.dim())


def test_momentum_goes_on_to_move_the_same_function():
    f, optimizer = trained("momentum")
    g, other = copy.deepcopy((f, optimizer))
    other = OPTIMIZERS["momentum"](list(g.parameters()))
    other.load_state_dict(optimizer.state_dict())
    follow(other, refine_knots(g, 3))
    for module, o in ((f, optimizer), (g, other)):
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        o.step()
    for t in (0.0, 0.2, 0.77):
        for a, b in zip(f.weights(t).values(), g.weights(t).values(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


class Losses(Refinement):
    """Notes the loss on one batch before and after each refinement."""

    def on_train_epoch_start(self, run, module):
        x, y = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3
        with torch.no_grad():
            before, done = nn.functional.cross_entropy(module(x), y), self.done
            super().on_train_epoch_start(run, module)
            after = nn.functional.cross_entropy(module(x), y)
        if self.done > done:
            self.jumps = [*getattr(self, "jumps", []), float((after - before).abs())]


def fit(tmp_path, callback, epochs=3, **options):
    run = trainer(tmp_path, max_epochs=epochs, callbacks=[callback], enable_checkpointing=False)
    module = Classifier(net(), sgd)
    run.fit(module, Random(), **options)
    return run, module


def test_new_knots_leave_the_loss_and_finer_steps_change_it_by_their_error(tmp_path):
    for options, most in (({"depth": 1}, 1e-6), ({}, 0.1)):
        callback = Losses(at=[1, 2], **options)
        run, module = fit(tmp_path, callback)
        (stack,) = continuous_stacks(module).values()
        assert len(callback.jumps) == 2 and max(callback.jumps) < most
        assert stack.block.knots == 8 and stack.depth == (2 if options else 8)
        groups = run.optimizers[0].param_groups
        assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in module.parameters()}
        assert len(groups) == len(parameter_groups(module))
        steps = [2, 2, 2] if options else [2, 4, 8]  # evaluations of an epoch
        assert callback.spent == pytest.approx(sum(steps) * 24 / 1e6)


def test_schemes_change_on_the_way(tmp_path):
    _, module = fit(tmp_path, Refinement(at=[1, 2], knots=1, depth=2, schemes=["midpoint", ""]))
    (stack,) = continuous_stacks(module).values()
    assert str(stack.scheme) == "midpoint" and stack.depth == 8 and stack.block.knots == 2


def test_a_refined_run_is_resumed(tmp_path):
    run, _ = fit(tmp_path, Refinement(at=[1]), epochs=2)
    run.save_checkpoint(path := tmp_path / "x.ckpt")
    run, other = fit(tmp_path, callback := Refinement(at=[1]), epochs=3, ckpt_path=path, weights_only=True)
    (stack,) = continuous_stacks(other).values()
    assert stack.depth == 4 and stack.block.knots == 4 and callback.done == 1
    assert run.global_step == 9 and callback.spent > 0
    with pytest.raises(SchemeError, match="was refined 1 times, and at has 0 epochs"):
        fit(tmp_path, Refinement(), epochs=3, ckpt_path=path, weights_only=True)


def test_what_is_refused(tmp_path):
    with pytest.raises(SchemeError, match="want rising epochs from 1 on"):
        Refinement(at=[2, 2])
    with pytest.raises(SchemeError, match="want whole numbers from 1 on"):
        Refinement(at=[1], depth=0)
    with pytest.raises(SchemeError, match="1 schemes for 2 epochs"):
        Refinement(at=[1, 2], schemes=["rk4"])
    plain = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 3))
    with pytest.raises(SchemeError, match="no weights that are functions of depth"):
        trainer(tmp_path, max_epochs=2, callbacks=[Refinement(at=[1])]).fit(Classifier(plain, sgd), Random())
    uneven = ContinuousWeights(nn.Linear(2, 2), knots=[0, 0.3, 1])
    with pytest.raises(SchemeError, match="not uniform"):
        refine_knots(uneven, 2)


def test_weight_decay_sees_the_blocks_own_dimensions():
    f = ContinuousWeights(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), 4)
    decayed, free = parameter_groups(Stack(f, "rk4", depth=4, step="span/depth"))
    assert [p.shape for p in decayed["params"]] == [(5, 4, 4)] and len(free["params"]) == 3


MOVED = {
    "refined": "--model.net.continuous 2 --model.net.act silu --model.net.scheme midpoint"
    " --trainer.callbacks+=odenets.training.Refinement --trainer.callbacks.at [1,2] --trainer.callbacks.depth 3"
    ' --trainer.callbacks.schemes ["rk4",""]',
    "stepped": "--trainer.callbacks+=odenets.training.StepSchedule --trainer.callbacks.stop 0.25",
}


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """Runs whose steps moved: the folder of each, and the net as it was trained."""
    found = {}
    for name, words in MOVED.items():
        folder = tmp_path_factory.mktemp(name)
        line = f"fit -c {ROOT / 'experiments/quickstart.yaml'} --run_dir {folder} --trainer.max_epochs 3 {words}"
        line += " --trainer.limit_train_batches 1 --trainer.limit_val_batches 1 --trainer.accelerator cpu"
        line += " --trainer.enable_model_summary false --model.net.functions [4,4] --model.net.widths [4,4]"
        found[name] = folder, train(line.split()).model.net.eval()
    return found


READERS = {
    "open_trained": lambda path: open_trained(path).net,
    "analyse": lambda path: analyse._net(path, open_checkpoint(path, resume=False).held),
    "convergence": lambda path: convergence.trained(path)[0],
    "from Python": lambda path: Classifier.load_from_checkpoint(path).net,
    "validate": lambda path: validated(path),
    "with its file": lambda path: validated(path, "-c", str(path.parents[1] / "config.yaml")),
}


def validated(path, *words):
    line = ["validate", *words, "--ckpt_path", str(path), "--trainer.limit_val_batches", "1"]
    return train([*line, "--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false"]).model.net


@pytest.mark.cases(8)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", MOVED)
def test_every_reader_of_a_checkpoint_has_the_net_that_was_trained(moved, kind, reader, monkeypatch):
    folder, net = moved[kind]
    monkeypatch.chdir(folder)
    path = folder / "checkpoints" / "last.ckpt"
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(READERS[reader](path).eval()(x), net(x))


@pytest.mark.parametrize("older", [True, False])
def test_a_refined_net_is_refined_as_the_checkpoint_says_whatever_it_was(older):
    found, x = net(depth=2), torch.randn(2, 1, 4, 4)
    held = {"callbacks": {"Refinement": {"done": 2, "spent": 0.0, "steps": [["", 2], ["midpoint", 3]]}}}
    if older:
        del held["callbacks"]["Refinement"]["steps"]
        options = {"at": [1, 2, 3], "depth": 6, "schemes": ["midpoint", "", "rk4"]}
        held["odenets"] = {"config": {"trainer": {"callbacks": [{"class_path": "x.Refinement", "init_args": options}]}}}
    for state, (scheme, depth) in (
        (held, ("midpoint", 72 if older else 12)),
        (held, ("midpoint", 72 if older else 12)),  # the same again
        ({"callbacks": {}}, ("euler", 2)),
    ):
        assert as_trained(found, state) is found
        (stack,) = continuous_stacks(found).values()
        assert (str(stack.scheme), stack.depth) == (scheme, depth)
        torch.testing.assert_close(found(x), net(depth=depth, scheme=scheme)(x))
    (stack,) = continuous_stacks(found).values()
    assert as_trained(stack, held).depth == (72 if older else 12)  # itself a stack


def test_weights_alone_say_how_they_were_trained(tmp_path):
    callback = Refinement(at=[1], depth=3)
    run, module = fit(tmp_path, callback, epochs=2)
    run.save_checkpoint(path := tmp_path / "x.ckpt", weights_only=True)
    other = Classifier.load_from_checkpoint(path, net=net(), optimizer=sgd)
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(other.net.eval()(x), module.net.eval()(x))
    # After the run too: the net goes back to the checkpoint's steps.
    run.fit_loop.max_epochs = 3
    callback.at = (1, 2)
    run.fit(module.train(), Random())
    run.test(module, Random(), ckpt_path=path, verbose=False, weights_only=True)
    (stack,) = continuous_stacks(module).values()
    assert stack.depth == 6 and stack.block.knots == 4


@pytest.mark.long
def test_a_checkpoint_runs_under_other_schemes(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    words = ["fit", "-c", str(ROOT / "experiments/quickstart.yaml"), "--run_dir", "run", "--trainer.accelerator", "cpu"]
    words += ["--model.net.continuous", "2", "--model.net.scheme", "midpoint", "--model.net.widths", "[8, 8]"]
    words += ["--model.net.act", "silu", "--trainer.max_epochs", "2", "--trainer.limit_train_batches", "3"]
    words += ["--trainer.limit_val_batches", "2", "--trainer.callbacks+=odenets.training.Refinement"]
    train([*words, "--trainer.callbacks.at", "[1]"])
    capsys.readouterr()
    main(
        "convergence run/checkpoints/last.ckpt --schemes euler rk4 --scales 1/2 1 2 --samples 50 --tolerances 1e-3 "
        "--plot wp.png --data.batch_size 20".split()
    )
    shown = capsys.readouterr().out
    # Two levels of 2 steps, which the refinement made 4; three multiples of them.
    assert re.findall(r"^(euler|rk4) +(\S+) +(\d+) ", shown, re.M) == [
        *[("euler", f"{n}/{n}", str(2 * n)) for n in (2, 4, 8)],
        *[("rk4", f"{n}/{n}", str(8 * n)) for n in (2, 4, 8)],
    ]
    assert "50 samples" in shown and "adaptive(dopri5" in shown and "fewest evaluations" in shown
    assert (tmp_path / "wp.png").stat().st_size > 1000
    torch.save({"state_dict": {}, "global_step": 0}, "other.ckpt")
    with pytest.raises(SystemExit):
        main(["convergence", "other.ckpt"])
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert math.isfinite(float(re.search(r"accuracy (\d\.\d+)", shown)[1])) and not fields_of(nn.Linear(1, 1))


@pytest.mark.parametrize("samples", [-1, -5])
def test_a_negative_number_of_samples_is_refused_before_anything_is_opened(samples, capsys):
    with pytest.raises(SchemeError, match=f"--samples is {samples}.*\n  Give 1 or more"):
        convergence.pictures(None, "val", samples)
    with pytest.raises(SystemExit):
        main(["convergence", "nowhere.ckpt", "--samples", str(samples)])
    first, second = capsys.readouterr().err.splitlines()
    assert f"--samples is {samples}" in first and "0 for all" in second


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluations_of_all_processes_are_counted(processes):
    callback, module = Refinement(), Classifier(net(depth=4), sgd)
    run = SimpleNamespace(world_size=processes)
    for size in (8, 8, 5):
        callback.on_train_batch_end(run, module, None, (torch.zeros(size, 1, 4, 4), None), 0)
    assert callback.spent == pytest.approx(processes * 21 * 4 / 1e6)
