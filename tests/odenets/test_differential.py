"""Networks and training histories drawn at random: every mode gives what the stored run gives, or refuses by name.

``python -m pytest tests/odenets/test_differential.py -n 0 --hypothesis-profile=long`` draws 10,000 of each.
"""

import contextlib
import copy
import math
import os
import random
import re
import threading
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import WIDTH, Body, factory, quiet
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import CheckpointError, checkpoint

import schemes
from odenets import SchemeError

F64 = torch.float64
DEPTH = 3


# Residual functions -----------------------------------------------------------------------------------------------


class Tied(Body):
    def __init__(self, slot):
        super().__init__(slot, nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)))
        self.middle[2].weight = self.middle[0].weight


class Averages(nn.Module):
    """Reads and writes a buffer, as observers of quantisation do."""

    def __init__(self, replaces):
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.replaces = replaces

    def forward(self, x):
        new = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        if self.replaces:
            self.mean = new
        else:
            self.mean.copy_(new)
        return x - self.mean


class Potential(nn.Module):
    """Keeps a plain attribute from call to call, as a spiking neuron its membrane potential."""

    def __init__(self):
        super().__init__()
        self.potential = None

    def forward(self, x):
        before = 0.0 if self.potential is None or self.potential.shape != x.shape else self.potential
        self.potential = (x + 0.5 * before).detach()
        return x + 0.1 * before


class Checkpointed(Body):
    def forward(self, *xs):
        return checkpoint(super().forward, *xs, use_reentrant=False)


class Timed(Body):
    def forward(self, *xs, t, context=None):
        y = super().forward(*xs) * (1 + torch.sin(torch.as_tensor(t, dtype=F64)))
        return y if context is None else y + context["bias"].mean()


class Auxiliary(Body):
    def forward(self, *xs):
        y = super().forward(*xs)
        return y, {"energy": y.square().sum()}


class Conjugate(Body):
    """Of complex streams; not holomorphic."""

    def forward(self, *xs):
        y = super().forward(*xs)
        return y + 0.1 * y.conj()


class Asking(Body):
    """Computes something else where there is no graph."""

    def forward(self, *xs):
        y = super().forward(*xs)
        return 2 * y if torch.is_grad_enabled() and y.requires_grad else y


class Hooked(Body):
    """Scales the gradient of its result."""

    def forward(self, *xs):
        y = super().forward(*xs)
        if y.requires_grad:
            y.register_hook(lambda g: 3 * g)
        return y


class Hamiltonian(Body):
    """Differentiates within itself."""

    def forward(self, *xs):
        y = super().forward(*xs)
        with torch.enable_grad():
            z = y if y.requires_grad else y.detach().requires_grad_()
            (g,) = torch.autograd.grad(z.sin().sum(), z, create_graph=True)
        return y * g


class Drawing(nn.Module):
    """Draws from generators of its own, and of Python."""

    def __init__(self):
        super().__init__()
        self.generator, self.seed = torch.Generator(), 5

    def forward(self, x):
        self.seed += 1
        self.generator.manual_seed(self.seed)
        return x * torch.rand((), dtype=x.dtype, generator=self.generator) * random.uniform(0.9, 1.1)


class Counting(nn.Module):
    """Reads what it has put into containers in earlier calls."""

    def __init__(self):
        super().__init__()
        self.seen = {"calls": 0, "last": []}

    def forward(self, x):
        self.seen["calls"] += 1
        self.seen["last"] = [*self.seen["last"][-2:], x.detach().sum() / max(1, x.numel())]
        return x + 0.1 * sum(self.seen["last"]) / self.seen["calls"]


class Within(nn.Module):
    """A stack as part of a residual function, in a mode of its own."""

    def __init__(self, mode):
        super().__init__()
        self.stack = quiet([nn.Linear(WIDTH, WIDTH) for _ in range(3)], "leapfrog", step=0.3, backprop=mode)

    def forward(self, x):
        return self.stack(x)


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).T


def symmetric():
    m = nn.Linear(WIDTH, WIDTH)
    parametrize.register_parametrization(m, "weight", Symmetric())
    return m


def pruned():
    return prune.l1_unstructured(nn.Linear(WIDTH, WIDTH), "weight", 0.5)


KINDS = {
    "plain": Body,
    "batch norm": lambda slot: Body(slot, nn.BatchNorm1d(WIDTH)),
    "group norm": lambda slot: Body(slot, nn.GroupNorm(2, WIDTH)),
    "dropout": lambda slot: Body(slot, nn.Dropout(0.4)),
    "tied": Tied,
    "weight norm": lambda slot: Body(slot, parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))),
    "spectral norm": lambda slot: Body(slot, parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))),
    "buffer written": lambda slot: Body(slot, Averages(False)),
    "buffer replaced": lambda slot: Body(slot, Averages(True)),
    "potential": lambda slot: Body(slot, Potential()),
    "checkpoint inside": Checkpointed,
    "time and context": Timed,
    "auxiliary": Auxiliary,
    "asking": Asking,
    "hooked": Hooked,
    "differentiated within": Hamiltonian,
    "drawing": lambda slot: Body(slot, Drawing()),
    "counting": lambda slot: Body(slot, Counting()),
    "reverse within": lambda slot: Body(slot, Within("reverse")),
    "checkpoint within": lambda slot: Body(slot, Within("checkpoint")),
    "symmetric": lambda slot: Body(slot, symmetric()),
    "pruned": lambda slot: Body(slot, pruned()),
    "complex": Conjugate,
}


def usable(text):
    """Whether an example can be a stack of small functions of one-dimensional features."""
    scheme = schemes.get(text)
    return scheme.nodes is not None and scheme.stages <= 8


SCHEMES = sorted(text for text in schemes.examples() if usable(text))
INVERTIBLE = [text for text in SCHEMES if schemes.get(text).reversible_in_training]


def build(scheme, kinds, mode, step, shared_seed=0):
    """The drawn stack; its functions take the kinds in turn."""
    torch.manual_seed(shared_seed)
    count = iter(range(10**6))

    def make(slot):
        return KINDS[kinds[next(count) % len(kinds)]](slot)

    depth = DEPTH * len(schemes.get(scheme).plan)
    net = factory(make, scheme, depth, channels=WIDTH, backprop=mode, step=step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of complex modules
        return net.to(torch.complex128 if "complex" in kinds else F64)


# Histories --------------------------------------------------------------------------------------------------------


def _doubled(module, given, out):
    return tuple(None if g is None else 2 * g for g in given)


def loss_of(y):
    return y.abs().square().mean() + y.real.sum() * 0.1


class Run:
    """A network in training; each action leaves what the user would see: outputs, gradients, buffers, generators."""

    def __init__(self, net, kinds, aux):
        self.net, self.kinds, self.aux = net, kinds, aux
        self.seen = []
        dtype = torch.complex128 if "complex" in kinds else F64
        self.x = torch.randn(5, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(1))
        self.bias = torch.randn(3, dtype=F64, generator=torch.Generator().manual_seed(2)).requires_grad_()

    def call(self, x, method="__call__"):
        given = {}
        if "time and context" in self.kinds:
            given = {"t": 0.3, "context": {"bias": self.bias}}
        if method == "__call__" and self.aux:
            y, values = self.net(x, aux=True, **given)
            return y, sum(values.values())
        y = getattr(self.net, method)(x, **given)
        return (y, 0.0) if isinstance(y, torch.Tensor) else (y[len(y) // 2], 0.0)

    def note(self, *outputs):
        grads = [p.grad for p in (*self.net.parameters(), self.bias)]
        self.seen += [None if y is None else y.detach().clone() for y in outputs]
        self.seen += [None if g is None else g.clone() for g in grads]
        self.seen += [*(b.clone() for b in self.net.buffers()), torch.get_rng_state()]
        self.seen.append(torch.tensor(random.getstate()[1]))

    def once(self, method="__call__"):
        x = self.x.clone().requires_grad_()
        y, aux = self.call(x, method)
        (loss_of(y) + aux).backward()
        self.note(y, x.grad)

    def middle(self):
        self.once("trajectory")

    def again(self):
        x = self.x.clone().requires_grad_()
        y, aux = self.call(x)
        loss = loss_of(y) + aux
        loss.backward(retain_graph=True)
        loss.backward()
        self.note(y, x.grad)

    def twice(self):
        """Two uses in one graph."""
        x = self.x.clone().requires_grad_()
        (y, one), (z, two) = self.call(x), self.call(0.5 * x)
        (loss_of(y) * loss_of(z) + one + two).backward()
        self.note(y, z, x.grad)

    def in_parts(self):
        """Gradients of some at a time, in any order."""
        x = self.x.clone().requires_grad_()
        y, aux = self.call(x)
        loss, wanted = loss_of(y) + aux, [p for p in self.net.parameters() if p.requires_grad]
        if not loss.requires_grad:
            return
        found = torch.autograd.grad(loss, wanted[-1:] or x, retain_graph=True, allow_unused=True)
        loss.backward(inputs=[x, *wanted[1:3]], retain_graph=True)
        self.note(y, *(g for g in found if g is not None), x.grad)
        loss.backward()
        self.note(x.grad)

    def by_batches(self):
        """A batch of gradients in one backward pass."""
        x = self.x.clone().requires_grad_()
        y, aux = self.call(x)
        loss = torch.stack([loss_of(y) + aux, y.abs().sum()])
        (g,) = torch.autograd.grad(loss, x, torch.eye(2, dtype=loss.dtype), is_grads_batched=True)
        self.note(y, g)

    def other_weights(self):
        """Weights that are handed in from outside, and lead on."""
        if "checkpoint inside" in self.kinds:
            # Torch's own runs again in the backward pass, when other weights stand there: its gradients are wrong, and
            # those of the inverse, which puts back what the call read, are right.
            return
        scale = torch.tensor(0.5, dtype=F64, requires_grad=True)
        weights = {k: scale * p for k, p in self.net.named_parameters()}
        x = self.x.clone().requires_grad_()
        given = {} if "time and context" not in self.kinds else {"t": 0.3, "context": {"bias": self.bias}}
        y = torch.func.functional_call(self.net, weights, (x,), given)
        loss_of(y).backward()
        self.note(y, x.grad, scale.grad)

    def copied(self):
        """A copy of the network between the passes, which then trains too."""
        x = self.x.clone().requires_grad_()
        y, aux = self.call(x)
        net, self.net = self.net, copy.deepcopy(self.net)
        (loss_of(y) + aux).backward()
        self.note(y, x.grad, *(p.grad for p in net.parameters()))
        self.once()

    def hooks_of_parameters(self):
        handles = [p.register_hook(lambda g: 2 * g) for p in self.net.parameters() if p.requires_grad]
        self.once()
        for handle in handles:
            handle.remove()

    def hooks_of_functions(self):
        """Hooks that scale what goes in and out, forward and backward."""
        functions = [f for step in self.net.steps for f in step.fs]
        handles = [f.register_forward_pre_hook(lambda m, xs: tuple(0.9 * x for x in xs)) for f in functions]
        handles += [f.register_full_backward_hook(_doubled) for f in functions]
        self.once()
        for handle in handles:
            handle.remove()

    def views(self):
        """An input that is a view, and not dense."""
        wide = torch.cat([self.x, self.x], 1).requires_grad_()
        y, aux = self.call(wide[:, ::2])
        (loss_of(y) + aux).backward()
        self.note(y, wide.grad)

    def no_gradient_of_the_input(self):
        y, aux = self.call(self.x)
        if y.requires_grad:
            (loss_of(y) + aux).backward()
        self.note(y)

    def on_the_host(self):
        """Saved tensors are taken by the user."""
        x = self.x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
            y, aux = self.call(x)
        (loss_of(y) + aux).backward()
        self.note(y, x.grad)

    def in_threads(self):
        """Two threads through one stack, one after the other forward, and at once backward."""
        runs = [(x, *self.call(x)) for x in (self.x.clone().requires_grad_(), 0.5 * self.x)]
        wanted = [p for p in self.net.parameters() if p.requires_grad]
        found = [None, None]

        def work(i):
            _, y, aux = runs[i]
            found[i] = torch.autograd.grad(loss_of(y) + aux, wanted, allow_unused=True)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2 if wanted else 0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.note(*(y for _, y, _ in runs), *(g for grads in found if grads for g in grads if g is not None))

    def evaluate(self):
        self.net.eval()
        with torch.no_grad():
            self.note(self.call(self.x)[0])
        self.net.train()

    def evaluated(self):
        """Gradients in evaluation."""
        self.net.eval()
        self.once()
        self.net.train()

    def eval_before_backward(self):
        x = self.x.clone().requires_grad_()
        y, aux = self.call(x)
        self.net.eval()
        (loss_of(y) + aux).backward()
        self.net.train()
        self.note(y, x.grad)

    def freeze(self):
        for p in [*self.net.parameters()][::2]:
            p.requires_grad_(False)

    def thaw_before_backward(self):
        self.freeze()
        x = self.x.clone().requires_grad_()
        y, aux = self.call(x)
        self.net.requires_grad_(True)
        (loss_of(y) + aux).backward()
        self.note(y, x.grad)

    def learn(self):
        with torch.no_grad():
            for p in self.net.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
        self.net.zero_grad()

    def empty(self):
        if not {"batch norm", "group norm", "spectral norm", "buffer written", "buffer replaced"} & {*self.kinds}:
            x, self.x = self.x, self.x[:0]
            with contextlib.suppress(ZeroDivisionError):
                y, _ = self.call(self.x.clone().requires_grad_())
                y.abs().sum().backward()
            self.x = x
            self.note()


ACTIONS = [name for name in vars(Run) if not name.startswith("_") and name not in ("call", "note")]
REFUSALS = (
    r"changed in place|side product|neither its parameter nor its argument|written to in place|"
    r"drew other random numbers|has no log-determinant|left the range|other values the second time|no inverse|"
    r"is_grads_batched|generator moved during a pass"
)


def go(net, kinds, history):
    """What a history leaves, or the error that ended it."""
    aux = bool({"auxiliary"} & {*kinds})
    run = Run(net, kinds, aux)
    torch.manual_seed(7)
    random.seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for action in history:
            getattr(run, action)()
    return run.seen


def agree(got, want, tolerance):
    """Whether two runs left the same; tensors in their common norm, as some gradients are zero but for rounding."""
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        zero = b is not None and a is None and not b.any()
        assert (a is None) == (b is None) or zero, (i, a, b)
    pairs = [(a, b) for a, b in zip(got, want, strict=True) if a is not None and b is not None]
    for a, b in pairs:
        assert a.shape == b.shape and a.dtype == b.dtype
        if not (a.is_floating_point() or a.is_complex()):
            assert torch.equal(a, b)
    pairs = [(a, b) for a, b in pairs if a.is_floating_point() or a.is_complex()]
    error = math.hypot(*(float((a - b).norm()) for a, b in pairs))
    size = math.hypot(*(float(b.norm()) for _, b in pairs))
    assert error <= tolerance * size, (error, size)


histories = st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=4)
kinds_drawn = st.one_of(
    st.lists(st.sampled_from([k for k in KINDS if k != "complex"]), min_size=1, max_size=3),
    st.sampled_from([["complex"], ["complex", "tied"], ["complex", "checkpoint inside"]]),
)


def compare(scheme, kinds, mode, step, history, tolerance, reference="store"):
    """The law: what ``reference`` gives, or a refusal of a documented kind."""
    try:
        net = build(scheme, kinds, mode, step)
    except SchemeError as error:
        assert mode.startswith("exact"), error  # affine, and bases with several streams
        return
    try:
        want = go(build(scheme, kinds, reference, step), kinds, history)
    except CheckpointError:
        assert "checkpoint inside" in kinds  # a checkpoint of the user's own, which minds parameters that were thawed
        return
    except RuntimeError as error:
        # Torch's own: a pruned layer keeps the weight of its last call, which has a graph.
        assert "support the deepcopy protocol" in str(error) and "copied" in history, error
        return
    except SchemeError as error:  # the reference is ours, and refuses as the mode does
        assert reference != "store" and re.search(REFUSALS, str(error)), error
        with pytest.raises(SchemeError):
            go(net, kinds, history)
        return
    try:
        got = go(net, kinds, history)
    except (SchemeError, RuntimeError) as error:
        assert re.search(REFUSALS, str(error)), error
        return
    agree(got, want, tolerance)


# A hundred in CI, where other laws draw fewer.
drawn = settings(max_examples=max(100 if os.environ.get("CI") else 0, settings().max_examples))


@drawn
@given(st.sampled_from(SCHEMES), kinds_drawn, st.sampled_from(["checkpoint", "checkpoint(2)"]), histories)
def test_checkpoint(scheme, kinds, mode, history):
    compare(scheme, kinds, mode, 0.5, history, 1e-12)


@drawn
@given(st.sampled_from(INVERTIBLE), kinds_drawn, st.sampled_from([0.5, "learned", "decay(0.9)"]), histories)
def test_reverse(scheme, kinds, step, history):
    compare(scheme, kinds, "reverse", step, history, 1e-8)


@drawn
@given(st.sampled_from(INVERTIBLE), kinds_drawn, histories)
def test_exact(scheme, kinds, history):
    if "complex" not in kinds:
        compare(scheme, kinds, "exact(bits=30)", 0.5, history, 1e-12, "exact(bits=30, store=true)")
