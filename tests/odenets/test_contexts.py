"""What functions are given besides the streams: any nesting of tensors, which is read as it was and gets gradients."""

from dataclasses import dataclass, make_dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from invertible import distance
from stacks import factory
from torch import nn

from odenets.backprop.given import tensors_in, with_tensors
from schemes.errors import SchemeError

F64 = torch.float64
AGAIN = pytest.mark.parametrize("mode", ["checkpoint", "checkpoint(3)", "reverse", "reverse(every=2)", "exact"])


@dataclass
class Conditions:
    scale: Any
    more: Any


Slotted = make_dataclass("Slotted", ["scale", "more"], slots=True)
Frozen = make_dataclass("Frozen", ["scale", "more"], frozen=True)


class Plain:
    def __init__(self, scale, more):
        self.scale, self.more, self.itself = scale, more, self


FORMS = {
    "dict": lambda a, b: {"scale": a, "more": b},
    "namespace": lambda a, b: SimpleNamespace(scale=a, more=b),
    "dataclass": Conditions,
    "dataclass with slots": Slotted,
    "frozen dataclass": Frozen,
    "object": Plain,
}
FORM = pytest.mark.parametrize("form", FORMS)


def read(context):
    """The two tensors of a context."""
    get = context.__getitem__ if isinstance(context, dict) else lambda name: getattr(context, name)
    return get("scale"), get("more")[0]


class Conditioned(nn.Module):
    def __init__(self, slot):
        super().__init__()
        self.inner = nn.Linear(sum(slot.in_channels), slot.out_channels)

    def forward(self, *xs, context):
        scale, more = read(context)
        return 0.3 * torch.tanh(self.inner(torch.cat(xs, 1)) * scale + more)


def build(mode, make=Conditioned, scheme="revnet"):
    torch.manual_seed(0)
    return factory(make, scheme, 3, channels=4, backprop=mode).double()


def batch():
    return torch.randn(5, 4, dtype=F64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def given(form, needs_grad=True):
    a, b = (torch.tensor(v, dtype=F64, requires_grad=needs_grad) for v in (0.7, 0.4))
    return FORMS[form](a, [b]), a, b


def reference(mode):
    """What a mode that runs functions again is compared with: the same arithmetic, all states kept."""
    return "exact(store=true)" if mode == "exact" else "store"


@FORM
@AGAIN
def test_tensors_get_their_gradients(form, mode):
    found = []
    for m in (reference(mode), mode):
        net, x = build(m), batch()
        context, a, b = given(form)
        net(x, context=context).square().sum().backward()
        found.append({"a": a.grad, "b": b.grad, "x": x.grad, **{k: p.grad for k, p in net.named_parameters()}})
    assert all(g is not None for g in found[0].values()) and distance(*found) <= 1e-9


def put(context, name, value):
    if isinstance(context, dict):
        context[name] = value
    else:
        object.__setattr__(context, name, value)


EXCHANGES = {
    "an entry": lambda context: put(context, "scale", torch.tensor(9.0, dtype=F64)),
    "an element": lambda context: read(context) and _list_of(context).__setitem__(0, torch.tensor(9.0, dtype=F64)),
}


def _list_of(context):
    return context["more"] if isinstance(context, dict) else context.more


@pytest.mark.cases(20)
@FORM
@AGAIN
@pytest.mark.parametrize("what", EXCHANGES)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_what_is_exchanged_before_the_backward_pass_is_read_as_it_was(form, mode, what, needs_grad):
    found = []
    for m in (reference(mode), mode):
        net, x = build(m), batch()
        context, a, b = given(form, needs_grad)
        y = net(x, context=context)
        EXCHANGES[what](context)
        y.square().sum().backward()
        assert 9.0 in [v.item() for v in read(context)], "what the caller has put there stays"
        found.append({"x": x.grad, "a": a.grad, "b": b.grad, **{k: p.grad for k, p in net.named_parameters()}})
    assert distance(*found) <= 1e-9


@FORM
@AGAIN
def test_what_is_written_to_before_the_backward_pass_is_an_error(form, mode):
    net, x = build(mode), batch()
    context, a, _ = given(form, needs_grad=False)
    y = net(x, context=context)
    a.add_(1)
    with pytest.raises(RuntimeError, match="changed in place between the forward and the backward"):
        y.square().sum().backward()


class Cached(nn.Module):
    """Keeps its values in a list that it is given, and reads the one before: a cache of keys."""

    detach = True

    def __init__(self, slot):
        super().__init__()
        self.inner = nn.Linear(sum(slot.in_channels), slot.out_channels)

    def forward(self, *xs, context):
        y = 0.3 * torch.tanh(self.inner(torch.cat(xs, 1)))
        before = context["cache"][-1] if context["cache"] else 0.0
        context["cache"].append(y.detach() if self.detach else y)
        return y * (1 + 0.3 * before)


@AGAIN
def test_a_cache_in_the_context_grows_once(mode):
    found, lengths = [], []
    for m in (reference(mode), mode):
        net = build(m, Cached)
        for _ in range(2):
            net.zero_grad()
            x, context = batch(), {"cache": []}
            net(x, context=context).square().sum().backward()
            lengths.append(len(context["cache"]))
        found.append({"x": x.grad, **{k: p.grad for k, p in net.named_parameters()}})
    assert len({*lengths}) == 1 and distance(*found) <= 1e-9


class WithGraph(Cached):
    detach = False


@pytest.mark.parametrize("mode", ["reverse", "exact"])
def test_a_cache_that_carries_gradients_is_refused_in_every_pass(mode):
    net = build(mode, WithGraph)
    for _ in range(3):
        with pytest.raises(SchemeError, match="put into the context"):
            net(batch(), context={"cache": []}).square().sum().backward()


def test_an_object_that_leads_back_to_itself():
    x = torch.ones(2)
    plain = Plain(x, [x])
    assert len([*tensors_in(plain)]) == 2
    copy = with_tensors({"a": plain}, lambda t: t + 1)["a"]
    assert copy is not plain and float(copy.scale[0]) == float(copy.more[0][0]) == 2.0 and plain.scale is x
    assert with_tensors(plain.__class__, lambda t: t) is Plain
