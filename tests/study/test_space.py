"""The sampler draws inside the budget, each network once, the same ones for the same seed; and counts what it draws."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import schemes
from odenets.study import SPACES, Candidate, RandomNet, count, sample
from odenets.study.space import ORDERS, scheme_of, shapes
from schemes import SchemeError


@pytest.mark.long
@given(
    scheme=st.sampled_from(["euler", "dense", "midpoint", "rk4"]),
    order=st.sampled_from(ORDERS),
    depth=st.sampled_from([4, 8]),
    middle=st.integers(1, 6),
    width=st.integers(1, 6),
    kernel=st.sampled_from([3, 5, 7, 9]),
    norm=st.sampled_from(["batch", "layer"]),
    size=st.integers(8, 12),
    classes=st.integers(2, 7),
)
def test_the_formula_counts_what_the_network_has(scheme, order, depth, middle, width, kernel, norm, size, classes):
    params, macs = count(scheme, order, depth, middle, width, kernel, size=size, classes=classes)
    with torch.device("meta"):
        net = RandomNet(Candidate(0, scheme, order, depth, middle, width, kernel, "relu", norm), classes).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.empty(1, 3, size, size))
    assert sum(p.numel() for p in net.parameters()) == params
    # Runge-Kutta takes each of its functions once a step, but not those that nothing reads.
    assert counter.get_total_flops() == 2 * macs


@pytest.mark.cases(8)
@pytest.mark.filterwarnings("ignore::schemes.MixingWarning")
@pytest.mark.parametrize("text", [*(t for n in schemes.names() for t in schemes.examples(n)), "dopri5 + euler"])
def test_a_scheme_is_counted_right_or_refused_before_a_network_is_drawn(text):
    """A budget counts what the network has and does: no function that nothing reads, none of another width."""
    try:
        scheme = scheme_of(text, 4)
    except SchemeError:
        with pytest.raises(SchemeError):
            count(text, "pre", 4, 4, 4, 3, size=8, classes=5)
        with pytest.raises(SchemeError):
            sample(SPACES["mini"], ("euler", text), 1, size=32, classes=10)
        return
    candidate = Candidate(0, text, "pre", 2 * scheme.stages, 3, 4, 3, "relu", "layer")
    with torch.device("meta"):
        net = RandomNet(candidate, 5).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.empty(1, 3, 8, 8))
    found = sum(p.numel() for p in net.parameters()), counter.get_total_flops() // 2
    assert count(text, "pre", candidate.depth, 3, 4, 3, size=8, classes=5) == found


@pytest.mark.parametrize("text", ["dopri5", "bosh3", "verner89", "2*tsit5", "nested(bosh3, euler)", "repeat(bosh3, 2)"])
def test_a_scheme_with_functions_that_nothing_reads_is_refused(text):
    with pytest.raises(SchemeError, match=r"weights that do nothing.*\n  Take"):
        scheme_of(text, 4)


@pytest.mark.parametrize("text", ["revcol", "revcol(3, growth=1)", "repeat(revcol, 2)", "repeat(dense(3), 2)"])
def test_a_scheme_that_appends_streams_is_refused(text):
    with pytest.raises(SchemeError, match="of one stream"):
        scheme_of(text, 4)


@pytest.mark.parametrize("name", SPACES)
def test_all_drawn_networks_are_inside_the_budget_and_differ(name):
    space = SPACES[name]
    size, classes = (32, 50) if name == "mini" else (64, 200)
    found = sample(space, ("euler", "dense"), 200, size=size, classes=classes)
    for c in found:
        assert space.params[0] < c.params < space.params[1] and space.macs[0] < c.macs < space.macs[1]
        arguments = c.scheme, c.order, c.depth, c.middle, c.width, c.kernel
        assert (c.params, c.macs) == count(*arguments, size=size, classes=classes)
        assert c.depth in space.depths and c.middle in space.middles and c.width in space.widths
        assert c.norm in space.norms and c.activation in space.activations and c.kernel in space.kernels
        assert c.strength in dict(space.augments).get(c.augment, (0.0,))
    assert [c.number for c in found] == list(range(len(found)))
    assert len({tuple(vars(c).values())[1:] for c in found}) == len(found)


def test_fifteen_thousand_networks_are_drawn_and_all_differ():
    found = sample(SPACES["C"], ("euler", "dense"), 2500)
    assert len(found) == 15_000 == len({tuple(vars(c).values())[1:] for c in found})


@given(seed=st.integers(0, 100), few=st.integers(1, 9))
def test_more_networks_continue_the_list_and_every_kind_has_its_turn(seed, few):
    space = SPACES["A"]
    short, long = (sample(space, ("euler", "dense"), n, seed=seed) for n in (few, 10))
    assert long[: len(short)] == short
    kinds = {(c.scheme, c.order) for c in long}
    assert len(kinds) == 6
    for start in range(0, len(long), 6):
        assert {(c.scheme, c.order) for c in long[start : start + 6]} == kinds


def test_the_seed_decides():
    first, again, other = (sample(SPACES["A"], ("euler", "dense"), 20, seed=s) for s in (1, 1, 2))
    assert first == again and first != other


def test_no_draw_touches_the_generators_of_others():
    state, torch_state = random.getstate(), torch.get_rng_state()
    sample(SPACES["A"], ("euler", "dense"), 5)
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), torch_state)


def test_draws_are_uniform_over_the_shapes_inside_the_budget():
    space = SPACES["B"]
    inside = shapes(space, "euler", "pre", 64, 200)
    found = [c for c in sample(space, ("euler", "dense"), 900) if (c.scheme, c.order) == ("euler", "pre")]
    # 900 of 99 x 5 x 2 = 990: nearly all, so that every shape has nearly all its ten twins.
    counts = [sum((c.depth, c.middle, c.width, c.kernel) == shape[:4] for c in found) for shape in inside]
    assert sum(counts) == 900 and min(counts) >= 4 and max(counts) <= 10


def test_asking_for_more_than_there_are_names_how_many_there_are():
    total = len(shapes(SPACES["A"], "euler", "pre", 64, 200)) * 5 * 2
    with pytest.raises(SchemeError, match=rf"has {total} networks of euler, pre inside.*take {total} or fewer"):
        sample(SPACES["A"], ("euler", "dense"), total + 1)
    assert sample(SPACES["A"], ("euler", "dense"), total)


def test_other_schemes_take_depths_that_they_fill():
    found = sample(SPACES["A"], ("euler", "midpoint", "nested(euler, midpoint)"), 30)
    assert {c.scheme for c in found} == {"euler", "midpoint", "nested(euler, midpoint)"}
    assert {c.depth % 2 for c in found if c.scheme != "euler"} == {0}
    assert {c.depth % 2 for c in found if c.scheme == "euler"} == {0, 1}


def test_augmentations_of_the_papers_spaces():
    for name in "DE":
        found = sample(SPACES[name], ("euler", "dense"), 60)
        assert {c.order for c in found} == {"pre"}
        kinds = {c.augment: {d.strength for d in found if d.augment == c.augment} for c in found}
        assert kinds["mixup"] == kinds["cutmix"] == {0.1, 0.3, 0.5} and kinds["rand_augment"] == {3, 5, 7}
        assert kinds["drop_path"] == {0.05, 0.1} and kinds["erase"] == {0.25}
    assert SPACES["D"].optimizer == "sgd" and SPACES["E"].optimizer == "adamw"
