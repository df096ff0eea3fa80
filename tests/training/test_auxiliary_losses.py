"""Auxiliary values of a network's stacks in the loss: what is added, in every mode, resumed, refused."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from odenets import ContinuousWeights, Stack, create_model
from odenets.continuous import fields_of
from odenets.gather import gathered, outermost, returning
from odenets.models import RevCol
from odenets.stack import StackHolder
from odenets.training import Classifier, Constant, Refinement, SupervisedClassifier
from odenets.training.command import run as train
from schemes import SchemeError

from .runs import ROOT
from .test_classifier import Random, pytestmark, trainer  # noqa: F401

plain_sgd = partial(torch.optim.SGD, lr=0.25)


class Balanced(nn.Module):
    """Returns a value beside its own, one per sample."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        y = self.linear(x).tanh()
        return y, {"balance": y.square().mean(1), "unwanted": y.sum()}


class Net(nn.Module):
    """Two stacks, which it calls itself."""

    def __init__(self, block=Balanced, mode="store"):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(36, 6)
        self.first = Stack([block(3) for _ in range(4)], "revnet", backprop=mode)
        self.second = Stack(ContinuousWeights(block(6), 2), "midpoint", depth=2, step="span/depth")
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.second(self.first(self.stem(x.flatten(1)))))


def by_hand(net, x):
    """Logits and the sum of the values, from `stack(x, aux=True)`."""
    z, a = net.first(net.stem(x.flatten(1)), aux=True)
    z, b = net.second(z, aux=True)
    return net.head(z), a["balance"] + b["balance"]


@pytest.mark.parametrize("mode", ["store", "checkpoint", "reverse", "exact"])
def test_a_step_is_that_of_the_loss_with_its_values(mode):
    x, y = torch.randn(8, 36, dtype=torch.float64), torch.arange(8) % 3
    net, other = Net(mode=mode).double(), Net().double()
    module = Classifier(net, plain_sgd, None, aux={"balance": 0.3})
    logged = {}
    module.log = lambda name, value, **_: logged.__setitem__(name, float(value.detach()))
    loss = module.training_step((x, y), 0)
    loss.backward()
    logits, balance = by_hand(other, x)
    want = cross_entropy(logits, y) + 0.3 * balance.mean()
    want.backward()
    torch.testing.assert_close(loss, want)
    assert logged["train/balance"] == pytest.approx(float(balance.mean().detach()), rel=1e-5)
    assert logged["train/loss"] == pytest.approx(float(cross_entropy(logits, y).detach()), rel=1e-5)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-9, rtol=1e-9)
    # Outside of a training step nothing is gathered, and a plain call gives logits alone.
    assert all(stack.into is None for stack in outermost(net)) and net(x).shape == (8, 3)


def small(**options):
    torch.manual_seed(0)
    defaults = {"functions": (2, 2), "widths": (4, 8), "stem": "conv3", "act": "silu", "continuous": 2}
    net = create_model("ho_resnet26", **{"scheme": "midpoint", "num_classes": 3, "in_chans": 1, **defaults, **options})
    for field in fields_of(net):
        for p in field.parameters():
            p.data += 0.2 * torch.randn_like(p)
    return net


def test_fields_return_their_energies_in_training_alone():
    net, x = small().double(), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    net(x)  # looked at before anybody asked
    keys, before = list(net.state_dict()), net(x)
    returning(net, ["kinetic", "jacobian"])
    assert list(net.state_dict()) == keys
    net.eval()
    with pytest.raises(SchemeError, match="'kinetic'; there are none"), gathered(net, "kinetic"):
        net(x)
    with gathered(net.train()) as values:
        torch.testing.assert_close(net(x), before)
    # The sum of mean |f|^2 over all evaluations of midpoint, read off the fields.
    seen = []
    returning(net, [])
    hooks = [f.register_forward_hook(lambda m, a, out: seen.append(out.square().mean())) for f in fields_of(net)]
    net(x)
    assert len(seen) == 4
    torch.testing.assert_close(values["kinetic"], sum(seen))
    for hook in hooks:
        hook.remove()
    with pytest.raises(SchemeError, match="returns no 'energy'; there are kinetic and jacobian"):
        returning(net, ["energy"])


def test_a_fields_jacobian_is_that_of_its_block():
    torch.manual_seed(0)
    field = ContinuousWeights(nn.Linear(4, 4, bias=False), 2).double()
    returning(field, ["jacobian"])
    x = torch.randn(3, 4, dtype=torch.float64)
    draws = torch.stack([field(0.3, x)[1]["jacobian"] for _ in range(300)])
    torch.testing.assert_close(draws.mean(), field.block.weight[0].square().sum() / 4, rtol=0.1, atol=0)
    with torch.no_grad():
        assert not field(0.3, x)[1]["jacobian"].requires_grad


@pytest.mark.parametrize("mode", ["checkpoint", "reverse", "exact", "auto(memory=1GB)"])
def test_energies_have_their_gradients_in_every_mode(mode):
    found = []
    for each in ("store", mode):
        net = small(scheme="revnet", backprop=each).double()
        returning(net, ["kinetic", "jacobian"])
        torch.manual_seed(3)
        x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
        with gathered(net, ["kinetic", "jacobian"]) as values:
            y = net(x)
        (y.sum() + values["kinetic"] + values["jacobian"]).backward()
        found.append([y, *values.values(), *(p.grad for p in net.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


def fit(tmp_path, epochs, callbacks=(), **options):
    run = trainer(tmp_path, max_epochs=epochs, callbacks=[*callbacks], enable_checkpointing=False)
    torch.manual_seed(1)
    sgd, net = partial(torch.optim.SGD, lr=0.1, momentum=0.9), small(functions=(2,), widths=(4,))
    module = Classifier(net, sgd, Constant(), aux={"kinetic": 0.5})
    data = Random()
    torch.manual_seed(2)
    data.setup("fit")
    data.setup = lambda stage: None
    run.fit(module, data, **options)
    return run, module


def test_a_run_with_a_penalty_is_refined_and_resumed(tmp_path):
    run, whole = fit(tmp_path, 3, [Refinement(at=[2])])
    assert math.isfinite(run.callback_metrics["train/kinetic"])
    first, _ = fit(tmp_path, 2, [Refinement(at=[2])])
    first.save_checkpoint(path := tmp_path / "x.ckpt")
    second, resumed = fit(tmp_path, 3, [Refinement(at=[2])], ckpt_path=path, weights_only=True)
    # The stacks that a refinement puts in place are asked too.
    assert second.callback_metrics["train/kinetic"] > 0
    assert [f.knots for f in fields_of(resumed)] == [4]
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=0, rtol=0)


def test_supervised_networks_too():
    class Returning(nn.Module):
        def __init__(self, f):
            super().__init__()
            self.f = f

        def forward(self, *args):
            y = self.f(*args)
            return y, {"size": y.square().mean()}

    net = RevCol(channels=(4, 8), blocks=(1, 1), columns=2, num_classes=3, supervision=True)
    for step in net.columns.steps:
        for i, f in enumerate(step.fs):
            step.fs[i] = Returning(f)
    x, y = torch.randn(2, 3, 16, 16), torch.tensor([0, 2])
    losses = []
    for aux in (None, {"size": 2.0}):
        module = SupervisedClassifier(net=net, optimizer=plain_sgd, aux=aux)
        module.log = lambda *a, **b: None
        losses.append(module.training_step((x, y), 0))
    with gathered(net, "size") as values:
        net.forward_supervised(x)
    torch.testing.assert_close(losses[1] - losses[0], 2 * values["size"], rtol=1e-4, atol=1e-5)


def test_log_determinants_and_nested_stacks():
    inner = Stack([nn.Linear(3, 3)])
    net = nn.Sequential(Stack([inner, nn.Linear(3, 3)], "revnet"), nn.Identity())
    assert outermost(net) == [net[0]]
    with gathered(net, "log_det") as values:
        net(torch.randn(5, 6))
    torch.testing.assert_close(values["log_det"], torch.zeros(5))

    class Holder(StackHolder, nn.Module):
        stack = net[0]  # no child

    assert outermost(nn.Sequential(Holder())) == [net[0]]


@pytest.mark.parametrize(
    ("aux", "net", "message"),
    [
        ({"balance": math.inf}, Net, "the weight of the auxiliary value 'balance' is inf, want a number"),
        ({"balance": "much"}, Net, "is 'much', want a number"),
        ({"loss": 1.0}, Net, "an auxiliary value named 'loss' would be logged as train/loss"),
        ({"balance": 1.0}, lambda: nn.Linear(2, 2), "Linear has no Stack"),
    ],
)
def test_what_is_refused(aux, net, message):
    with pytest.raises(SchemeError, match=message):
        Classifier(net(), plain_sgd, aux=aux)


def test_a_pass_that_fails_leaves_nothing_behind():
    net = Net()
    with pytest.raises(SchemeError, match="'energy'; there are balance, unwanted"), gathered(net, ["energy"]):
        net(torch.randn(2, 36))
    with pytest.raises(ZeroDivisionError), gathered(net):
        raise ZeroDivisionError
    assert all(stack.into is None for stack in outermost(net))
    assert copy.deepcopy(net)(torch.randn(2, 36)).shape == (2, 3)
    with pytest.raises(SchemeError, match="Linear has no Stack"), gathered(nn.Linear(2, 2)):
        pass


def test_what_nobody_returns_ends_the_first_step(tmp_path):
    run = trainer(tmp_path, max_epochs=1, enable_checkpointing=False, num_sanity_val_steps=0)
    with pytest.raises(SchemeError, match=r"'energy'; there are balance, unwanted\.\n  A residual"):
        run.fit(Classifier(Net(), plain_sgd, aux={"balance": 1.0, "energy": 1.0}), Random())
    assert run.global_step == 0


@pytest.mark.long
def test_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["fit", "-c", str(ROOT / "experiments/quickstart.yaml"), "--run_dir", "run", "--trainer.accelerator", "cpu"]
    words += ["--model.net.widths", "[8, 8]", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]
    words += ["--trainer.limit_val_batches", "1", "--model.aux.kinetic", "0.01"]
    train([*words, "--model.net.continuous", "2", "--model.net.scheme", "midpoint", "--model.net.act", "silu"])
    assert "train/kinetic" in next((tmp_path / "run").rglob("metrics.csv")).read_text()
