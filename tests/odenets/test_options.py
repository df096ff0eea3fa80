"""What is no option is refused where it is read: by its name, in two lines, before anything is made or changed."""

import copy
import inspect
import math
from dataclasses import fields

import pytest
import torch
from torch import nn

from odenets import PerSlot, SchemeError, Stack
from odenets.backprop import parse_mode
from odenets.backprop.modes import FAMILIES
from odenets.planning import load_plan_state, plan_state
from schemes.scheme import Slot
from schemes.step_size import Decay

ANYTHING = [object(), math.nan, 1 + 2j, b"x"]  # wrong for every argument
CONTAINER = nn.ModuleDict({"a": nn.Linear(4, 4)})
# Wrong for single arguments of a stack; a new argument without a row fails the test below.
WRONG = {
    "block": [3, None, nn.Linear, [nn.Linear], [None], [3], CONTAINER, [CONTAINER], {"a": torch.relu}, {torch.relu}],
    "scheme": [3, None, nn.Linear, ["rk4"], "", "RK4", True],
    "depth": [0, -1, 1.0, 1.5, True, "2", 10**12, 10**400],
    "shortcut": [3, "a", torch.relu, nn.Identity, CONTAINER, [CONTAINER], {"a": nn.Identity()}],
    "step": [None, True, "x", "decay", "decay(0)", math.inf, [1.0], Decay(1e200)],
    "step_offset": ["1", None, 1.5, -1, True, 10**400],
    "post_step": [3, "relu", nn.ReLU, CONTAINER, [nn.ReLU()]],
    "backprop": [3, True, "nope", [], nn.Linear, "2*store", "exact(bits=99)", "reverse(drift=3)"],
    "example": [3, "a", (2, 8.0), (-1, 4), (True, 4), {2, 8}, (10**9, 10**9, 10**9), (10**400,)],
    "seed": [1.5, True, "a", 2**70, -(2**63) - 1],
}
FACTORY = {
    "make": [3, None, "relu"],
    "scheme": WRONG["scheme"],
    "depth": WRONG["depth"],
    "channels": [0, -1, 1.5, True, "4", None],
    "out_channels": [0, -1, 1.5, True, "4"],
}
WORDS = {
    "block": "block|residual function",
    "step": "step",
    "scheme": "scheme|there is no",
    "backprop": "backprop|the plan",
}


def arguments(function):
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind not in kinds]


def test_every_argument_has_wrong_values():
    assert [*WRONG] == arguments(Stack)
    assert {*FACTORY} == {*arguments(Stack.from_factory)}


def refused(call):
    """The message of a refusal, two lines at most, after which generators are as they were."""
    generator = torch.get_rng_state()
    with pytest.raises(SchemeError) as caught:
        call()
    assert len(str(caught.value).splitlines()) <= 2 and len(str(caught.value)) < 400
    assert torch.equal(torch.get_rng_state(), generator)
    return str(caught.value)


@pytest.mark.parametrize("name", WRONG)
def test_a_stack_refuses_wrong_arguments_and_leaves_nothing_behind(name):
    for value in [*WRONG[name], *ANYTHING]:
        shared = PerSlot([nn.Linear(4, 4), nn.Linear(4, 4)])
        before = copy.deepcopy(shared.state_dict())
        # A scheme of two slots that draws, so that every argument has a meaning: only the one under test is wrong.
        right = {"block": shared, "scheme": "midpoint", "depth": 3, "step": "decay(0.9)"}
        if name == "seed":
            right |= {"scheme": "bdia", "block": torch.nn.Linear(4, 4)}
        message = refused(lambda right=right, value=value: Stack(**{**right, name: value}))
        assert any(word in message for word in WORDS.get(name, name).split("|")), (name, value, message)
        assert not shared.revisions  # a stack that was not made is not told of exchanged functions
        assert all(torch.equal(a, b) for a, b in zip(before.values(), shared.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", FACTORY)
def test_a_factory_is_not_called_for_wrong_arguments(name):
    made = []

    def make(slot: Slot):
        made.append(slot)
        return nn.Linear(4, 4)

    right = {"make": make, "scheme": "midpoint", "depth": 3, "channels": 4, "out_channels": 4}
    for value in [*FACTORY[name], *ANYTHING]:
        refused(lambda value=value: Stack.from_factory(**{**right, name: value}))
        assert not made


def test_right_arguments_stay_right():
    stack = Stack([nn.Linear(4, 4)], step_offset=3, step="decay(0.5)", post_step=torch.relu, example=(2, 4))
    assert stack.steps[0].h == 0.125 and stack(torch.ones(2, 4)).min() >= 0
    # A callable between the steps is recomputed as a module is.
    stack.backprop = "checkpoint"
    stack(torch.ones(2, 4, requires_grad=True)).sum().backward()
    assert [*stack.state_dict()] == ["steps.0.fs.0.weight", "steps.0.fs.0.bias"]
    for seed in (0, -1, 2**64 - 1):
        Stack(nn.Linear(4, 4), "bdia", 2, seed=seed)
    for example in ([2, 4], (0, 4), torch.ones(2, 4), torch.Size((2, 4))):
        Stack(nn.Linear(4, 4), example=example)


OPTIONS = [(name, field) for name, family in sorted(FAMILIES.items()) for field in fields(family)]


@pytest.mark.parametrize(("name", "field"), OPTIONS, ids=[f"{name}-{f.name}" for name, f in OPTIONS])
def test_every_option_of_every_mode_is_checked_when_it_is_read(name, field):
    wrong = [*ANYTHING, "x", [], -1]
    if isinstance(field.default, bool):
        wrong += [0, 1, 3, None, "true"]
        for text in ("true", "True", "false"):
            assert getattr(parse_mode(f"{name}({field.name}={text})"), field.name) is (text.lower() == "true")
    else:
        wrong += [True, math.inf]
    for value in wrong:
        assert field.name in refused(lambda value=value: FAMILIES[name](**{field.name: value}))
    for text in ("-1", "true" if not isinstance(field.default, bool) else "3", "store"):
        assert field.name in refused(lambda text=text: parse_mode(f"{name}({field.name}={text})"))


def test_binary_places_that_no_format_has():
    assert parse_mode("exact(bits=50)").bits == 50
    assert "at most 50" in refused(lambda: parse_mode("exact(bits=51)"))
    net = Stack([nn.Linear(4, 4) for _ in range(4)], "revnet", backprop="exact(bits=22)")
    assert "1 to 21 in this format" in refused(lambda: net(torch.ones(2, 8)))
    net.double()(torch.ones(2, 8, dtype=torch.float64))


@pytest.mark.parametrize("memory", ["nan", "inf", "GB", "", " ", "x", "-1GB", 0, -1, math.nan, math.inf, True, [1]])
def test_sizes_that_are_none(memory):
    net = Stack([nn.Linear(4, 4) for _ in range(4)], "revnet")
    message = refused(lambda: net.plan(torch.ones(2, 8), memory=memory))
    assert "plan(memory)" in message and "want a size such as 2GB, 512MiB, or a number of MiB" in message


def test_an_unknown_unit_is_said_once():
    net = Stack([nn.Linear(4, 4)])
    message = refused(lambda: net.plan(torch.ones(2, 4), memory="1XB"))
    assert message.count("1XB") == 1 and "there is no unit 'XB'" in message and "TB" in message


def test_nothing_to_train_is_no_plan():
    net = Stack([nn.Linear(4, 4) for _ in range(4)], "revnet").requires_grad_(False)
    assert "no output needs a gradient" in refused(lambda: net.plan(torch.ones(2, 8)))
    assert net.plan(torch.ones(2, 8, requires_grad=True)).rows


# Plan states


def trained(depth=4, mode="auto(memory=1GB)", scheme="revnet", seed=None):
    torch.manual_seed(0)
    net = Stack([nn.Linear(4, 4) for _ in range(depth * (2 if scheme == "revnet" else 1))], scheme, seed=seed)
    net.backprop = mode
    net(torch.randn(2, 8 if scheme == "revnet" else 4, requires_grad=True)).sum().backward()
    return net


def places(state, path=()):
    """All places of a nesting, the whole first."""
    yield path
    inner = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for key, value in inner:
        yield from places(value, (*path, key))


def replaced(state, path, value):
    if not path:
        return value
    state = copy.copy(state)
    state[path[0]] = replaced(state[path[0]], path[1:], value)
    return state


STATES = {
    "auto": {},
    "anchors": {"mode": "reverse"},
    "parts": {"mode": "2*store + 2*reverse"},
    "draws": {"mode": "reverse", "scheme": "bdia", "seed": 3},
}


@pytest.mark.parametrize("kind", STATES)
def test_a_damaged_plan_state_is_refused_and_nothing_has_changed(kind):
    net = trained(**STATES[kind])
    good = net.plan_state()
    assert kind in good
    before, count = repr(good), 0
    for path in places(good):
        for junk in (object(), None, "x", [], {}, -1, [["x"]]):
            try:
                net.load_plan_state(replaced(good, path, junk))
            except SchemeError as error:
                assert len(str(error).splitlines()) <= 2
                assert repr(net.plan_state()) == before, (path, junk)
                count += 1
            else:  # such as no anchors, or no drifts
                assert type(junk) is not object, path
                net.load_plan_state(good)
    assert count > 10
    refused(lambda: net.load_plan_state({**good, "other": 1}))
    net.load_plan_state(good)
    assert repr(net.plan_state()) == before


def test_the_plan_of_another_stack_is_refused():
    net, other = trained(4), trained(6)
    before = repr(net.plan_state())
    message = refused(lambda: net.load_plan_state(other.plan_state()))
    assert "one for 6 steps, and the stack has 4" in message and repr(net.plan_state()) == before
    # One that the scheme cannot run.
    state = {"auto": {"plan": [[4, "reverse"]], "size": 64, "final": True}}
    plain, unseeded = trained(4, scheme="euler"), trained(mode="reverse", scheme="bdia")
    assert "has no inverse" in refused(lambda: plain.load_plan_state(state))
    drawn = trained(**STATES["draws"]).plan_state()
    assert "seed" in refused(lambda: unseeded.load_plan_state(drawn))


def test_all_stacks_of_a_model_or_none():
    model = nn.Sequential(trained(), trained())
    state = plan_state(model)
    for bad in (None, [], 3, {**state, "2": state["1"]}, {"0": state["0"], "1": {"auto": None}}):
        fresh = nn.Sequential(*(Stack([nn.Linear(4, 4) for _ in range(8)], "revnet") for _ in range(2)))
        refused(lambda bad=bad, fresh=fresh: load_plan_state(fresh, bad))
        assert plan_state(fresh) == {}
    load_plan_state(fresh, state)
    assert plan_state(fresh) == state
