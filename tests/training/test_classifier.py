"""The Classifier: parameter groups, schedules, what it logs, and checkpoints that load with weights_only."""

import math
from functools import partial
from itertools import pairwise

import lightning as L
import pytest
import torch
from torch import nn

from odenets.training import Classifier, Constant, OneCycle, Pictures, WarmupCosine
from odenets.training.classifier import evaluations, parameter_groups
from odenets.training.data import Cached
from schemes import SchemeError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*", "ignore:.*does not have many workers.*", "ignore:.*smaller than the logging interval.*"
)


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.h, self.head = nn.Parameter(torch.tensor(1.0)), nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.norm(self.h * self.conv(x)).relu().mean((2, 3)))


class Random(Pictures):
    in_chans = 1

    def __init__(self, classes: int = 3, n: int = 24) -> None:
        super().__init__(8, 0, [0.5], [0.5], None)
        self.num_classes, self.n = classes, n

    def setup(self, stage):
        data = Cached(torch.rand(self.n, 1, 6, 6), torch.arange(self.n) % self.num_classes)
        self.sets = {"train": data, "val": data, "test": data}


sgd = partial(torch.optim.SGD, lr=0.5, momentum=0.9, weight_decay=0.1)


def trainer(tmp_path, **kwargs):
    options = {"max_epochs": 2, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(default_root_dir=tmp_path, accelerator="cpu", **{**options, **kwargs})


def test_every_parameter_is_in_one_group_with_its_own_decay():
    net = Net()
    optimizer = sgd(parameter_groups(net, step_weight_decay=0.3))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decay) == len(list(net.parameters()))
    assert decay[id(net.conv.weight)] == decay[id(net.head.weight)] == 0.1
    assert decay[id(net.norm.weight)] == decay[id(net.norm.bias)] == decay[id(net.conv.bias)] == 0
    assert decay[id(net.h)] == 0.3
    net.conv.weight.requires_grad_(False)
    assert len(parameter_groups(nn.Linear(2, 2, bias=False))) == 1


def test_learned_steps_of_a_stack_get_their_own_decay():
    from odenets import Stack

    stack = Stack([nn.Linear(2, 2) for _ in range(4)], "midpoint", step="learned")
    groups = {g.get("weight_decay"): g["params"] for g in parameter_groups(stack, step_weight_decay=0.3)}
    assert len(groups[0.3]) == 2 and len(groups[None]) == 4 and len(groups[0.0]) == 4


def test_warmup_cosine_rises_then_falls_to_its_end():
    schedule = WarmupCosine(warmup=2, final=0.1)
    lr = [schedule.factor(i, 100, 10) for i in range(101)]
    assert lr[:20] == pytest.approx([(i + 1) / 20 for i in range(20)])
    assert all(a >= b for a, b in pairwise(lr[19:])) and lr[100] == pytest.approx(0.1)
    assert lr[60] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert WarmupCosine(warmup=1000).factor(0, 10, 5) == 1 / 5


@pytest.mark.parametrize("schedule", [WarmupCosine(), Constant(), OneCycle(momentum=False)])
def test_a_run_is_as_long_as_its_schedule(tmp_path, schedule):
    model = Classifier(Net(), sgd, schedule)
    run = trainer(tmp_path)
    run.fit(model, Random())
    assert run.global_step == 6
    lr = run.optimizers[0].param_groups[0]["lr"]
    assert lr == 0.5 if isinstance(schedule, Constant) else lr < 0.05


@pytest.mark.cases(3)
@pytest.mark.parametrize("every", [1, 2, 4, 7, 3])
def test_every_step_is_the_mean_of_its_batches(tmp_path, every):
    """Also the last of an epoch, which has fewer: five batches of 8, and the gradients that they have by hand."""
    seen = []

    class Sees(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append((*batch, {k: v.clone() for k, v in pl_module.net.state_dict().items()}))

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            net, mine = Net(), seen[:]
            seen.clear()
            net.load_state_dict(mine[0][2])
            losses = [nn.functional.cross_entropy(net(x), y) for x, y, _ in mine]
            want = torch.autograd.grad(torch.stack(losses).mean(), list(net.parameters()))
            for p, g in zip(pl_module.net.parameters(), want, strict=True):
                torch.testing.assert_close(p.grad, g, atol=1e-6, rtol=1e-5)
            counts.append(len(mine))

    counts: list[int] = []
    model = Classifier(Net(), partial(torch.optim.SGD, lr=0.1), Constant())
    trainer(tmp_path, callbacks=[Sees()], accumulate_grad_batches=every).fit(model, Random(n=40))
    assert counts == [min(every, 5 - i) for _ in range(2) for i in range(0, 5, every)]


def test_an_endless_run_wants_a_constant_rate(tmp_path):
    with pytest.raises(SchemeError, match="max_epochs"):
        trainer(tmp_path, max_epochs=-1, max_time={"seconds": 1}).fit(Classifier(Net(), sgd), Random())
    trainer(tmp_path, max_epochs=-1, max_time={"seconds": 0}).fit(Classifier(Net(), sgd, Constant()), Random())


@pytest.mark.parametrize("classes", [3, 120])
def test_logged_figures(tmp_path, classes):
    run = trainer(tmp_path)
    run.fit(Classifier(Net(classes), sgd, label_smoothing=0.1), Random(classes))
    names = set(run.callback_metrics)
    assert {"train/loss", "train/acc", "val/loss", "val/acc"} <= names
    assert ("val/acc5" in names) == (classes >= 100)


def test_accuracy_is_the_mean_over_pictures_not_batches(tmp_path):
    class First(Net):
        def forward(self, x):
            return torch.nn.functional.one_hot(torch.zeros(len(x), dtype=torch.long), 3).float() + 0 * super().forward(
                x
            )

    data = Random(n=10)  # batches of 8 and 2: labels 0 1 2 0 1 2 0 1 | 2 0
    figures = trainer(tmp_path).validate(Classifier(First(), sgd), data, verbose=False)[0]
    assert figures["val/acc"] == pytest.approx(4 / 10)


def logged(model: Classifier) -> dict[str, torch.Tensor]:
    """What a step logs from here on."""
    found: dict[str, torch.Tensor] = {}
    model.log = lambda name, value, **kwargs: found.update({name: value})
    return found


def test_the_loss_is_smoothed_and_hits_are_those_of_the_heaviest_label():
    model = Classifier(Net(), sgd, label_smoothing=0.3)
    figures, x, y = logged(model), torch.rand(6, 1, 6, 6), torch.tensor([0, 1, 2, 0, 1, 2])
    logits = model(x)
    log_p = logits.log_softmax(1)
    want = -(0.7 * log_p[torch.arange(6), y] + 0.3 * log_p.mean(1)).mean()
    torch.testing.assert_close(model.training_step((x, y), 0), want)
    for heaviest, hits in ((logits.argmax(1), 1.0), ((logits.argmax(1) + 1) % 3, 0.0)):
        rows = torch.full((6, 3), 0.2)
        rows[torch.arange(6), heaviest] = 0.6
        model.training_step((x, rows), 0)
        assert float(figures["train/acc"]) == hits


def test_a_label_among_the_first_five_counts(tmp_path):
    class Falling(Net):
        def forward(self, x):
            return torch.arange(120.0, 0, -1).expand(len(x), 120) + 0 * super().forward(x)

    run = trainer(tmp_path)  # labels 0 to 23, of which 0 to 4 are among the first five
    figures = run.validate(Classifier(Falling(120), sgd), Random(120), verbose=False)[0]
    assert figures["val/acc"] == pytest.approx(1 / 24) and figures["val/acc5"] == pytest.approx(5 / 24)


def test_soft_labels_train(tmp_path):
    model = Classifier(Net(), sgd)
    model.log = lambda *args, **kwargs: None
    hard = model.training_step((x := torch.rand(4, 1, 6, 6), y := torch.tensor([0, 1, 2, 0])), 0)
    model.net.norm.reset_running_stats()
    soft = model.training_step((x, torch.nn.functional.one_hot(y, 3).float()), 0)
    torch.testing.assert_close(hard, soft)


def test_prediction_is_a_distribution(tmp_path):
    batches = trainer(tmp_path).predict(Classifier(Net(), sgd), Random())
    probabilities = torch.cat(batches)
    assert probabilities.shape == (24, 3)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(24))


def test_channels_last_and_compile_keep_the_names(tmp_path):
    model = Classifier(Net(), sgd, channels_last=True, compile=True)
    names = list(model.state_dict())
    model.net.compile = lambda: setattr(model, "was_compiled", True)  # compiling takes minutes
    seen = []
    model.net.conv.register_forward_hook(lambda m, args, out: seen.append((args[0], m.weight)))
    trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(model, Random())
    assert list(model.state_dict()) == names and model.was_compiled
    assert seen[0][1].is_contiguous(memory_format=torch.channels_last)


def test_checkpoint_of_a_python_built_model(tmp_path):
    model = Classifier(Net(), sgd, label_smoothing=0.1)
    run = trainer(tmp_path)
    run.fit(model, Random())
    run.save_checkpoint(path := tmp_path / "x.ckpt")
    assert torch.load(path, weights_only=True)["hyper_parameters"]["label_smoothing"] == 0.1
    with pytest.raises(TypeError, match=r"does not hold its net[\s\S]*net=\.\.\., optimizer=\.\.\."):
        Classifier.load_from_checkpoint(path)
    again = Classifier.load_from_checkpoint(path, net=Net(), optimizer=sgd)
    assert again.label_smoothing == 0.1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_figures_of_adaptive_solvers_are_summed_over_stacks():
    from odenets import Stack
    from odenets.training.module import solver_figures

    one, two = (Stack(torch.tanh, "adaptive(dopri5)", depth=n) for n in (1, 4))
    net = nn.Sequential(one, nn.Linear(2, 2), Stack(nn.Linear(2, 2), "rk4"), two)
    net(torch.ones(1, 2))
    steps = [stack.solves[0].accepted for stack in (one, two)]
    assert 0 < steps[0] < steps[1]
    figures = solver_figures(net)
    assert figures["solver/accepted"] == sum(steps) and figures["solver/finished"] == 1
    assert figures["solver/rejected"] == sum(stack.solves[0].rejected for stack in (one, two))
    assert solver_figures(nn.Sequential(net[1:3])) == {}


def test_evaluations_are_summed_over_outermost_stacks():
    from odenets import Stack

    make = lambda n: [nn.Linear(2, 2) for _ in range(n)]  # noqa: E731
    assert evaluations(nn.Sequential(Stack(make(8), "rk4"), nn.Linear(2, 2), Stack(make(2), "midpoint"))) == 10
    assert evaluations(Net()) == 0
