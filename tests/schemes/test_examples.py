"""The laws, for every scheme that is there: each registered name and each class brings its examples."""

import inspect
from collections.abc import Iterator

import pytest
import torch

import schemes
from schemes import RevNetCoupling, RungeKutta, Scheme, registry, tableaux
from schemes.compose import Repeat, Steps
from schemes.coupling import Coupling, Update, scaled
from schemes.language import sampled
from schemes.multistep import Momentum
from schemes.scheme import MAX_FUNCTIONS
from schemes.testing import check_scheme, check_wrapper, check_wrappers

EXAMPLES = schemes.examples()
FIXED = [text for text in EXAMPLES if schemes.get(text).nodes is not None]


@pytest.mark.cases(57)
@pytest.mark.parametrize("text", EXAMPLES)
def test_laws(text):
    check_scheme(text)


@pytest.mark.cases(20)
@pytest.mark.parametrize("text", [text for text in FIXED if schemes.get(text).stages <= 8])
def test_a_wrapper_is_what_it_stands_around(text):
    check_wrappers(text)


# Nothing is left out.


def concrete(base: type = Scheme) -> Iterator[type]:
    """The concrete classes of schemes in the package."""
    for cls in base.__subclasses__():
        if not inspect.isabstract(cls) and cls.__module__.startswith("schemes.") and not cls.__name__.startswith("_"):
            yield cls
        yield from concrete(cls)


def reached() -> set[type]:
    """The classes of all examples, of their steps, and of their steps in training."""
    found: set[type] = set()
    for text in EXAMPLES:
        scheme = schemes.get(text)
        steps = [scheme.at(n) for n in (0, 1)]
        found |= {
            type(s) for s in (scheme, *steps, *(p.training_scheme(n, torch.zeros(2, 3)) for n, p in enumerate(steps)))
        }
    return found


def without_examples(classes: list[type]) -> list[str]:
    """Classes that no example reaches, or whose own examples are of another class."""
    known = reached()
    own = {cls: cls.__dict__.get("examples", ()) for cls in classes}
    return [
        cls.__name__
        for cls in classes
        if cls not in known or any(type(schemes.get(text)) is not cls for text in own[cls])
    ]


def test_every_concrete_class_has_examples():
    classes = [cls for cls in concrete() if inspect.isclass(cls)]
    assert {RungeKutta, RevNetCoupling, Repeat, Steps} <= set(classes)
    assert without_examples(classes) == []


def test_a_class_without_examples_fails_by_name():
    class Forgotten(RungeKutta):
        pass

    class Mistaken(RungeKutta):
        examples = ("leapfrog",)

    assert without_examples([RungeKutta, Forgotten, Mistaken]) == ["Forgotten", "Mistaken"]


def names_without_examples() -> list[str]:
    """Registered names that no example says."""
    return [name for name in schemes.names() if not schemes.examples(name)]


def test_every_registered_name_has_an_example(monkeypatch):
    assert names_without_examples() == []
    for name in schemes.names():
        for text in schemes.examples(name):
            assert schemes.get(text).stages >= 1, text
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    schemes.register("twice", lambda scheme: Repeat(scheme, 2))
    assert names_without_examples() == ["twice"]
    schemes.register("bare", lambda: Repeat(schemes.get("rk4"), 2))
    assert schemes.examples("bare") == ("bare",), "it can be called without arguments"
    schemes.register("thrice", sampled("thrice(rk4)")(lambda scheme: Repeat(scheme, 3)))
    assert schemes.examples("thrice") == ("thrice(rk4)",) and "thrice(rk4)" in schemes.examples()


def test_every_tableau_and_its_pruned_form_are_examples():
    assert set(tableaux.METHODS) | set(tableaux.FAMILIES) <= {text.split("(")[0] for text in EXAMPLES}
    assert all(t.cite and len(t.cite) > 8 for t in tableaux.METHODS.values())


@pytest.mark.parametrize("name", ["repeat", "substeps"])
def test_the_limit_itself_is_built(name):
    assert schemes.get(f"{name}(euler, 4096)").stages == 4096
    with pytest.raises(schemes.SchemeError, match="a whole number from 1 to 4096"):
        schemes.get(f"{name}(euler, 4097)")


@pytest.mark.cases(25)
@pytest.mark.parametrize("name", schemes.names())
def test_no_family_builds_more_than_the_limit(name, monkeypatch):
    """Every whole-number argument of a family, and nested ones, taken far beyond it: refused at once, in two lines."""
    texts = []
    for text in schemes.examples(name):
        _, _, rest = text.partition("(")
        first = rest.rstrip(")").split(",")[0]
        if first.isdigit():
            texts += [text.replace(first, big, 1) for big in ("4097", "999999999999") if name != "dense"]
        texts += [f"nested(repeat(euler, 4096), {text})", f"repeat({text}, 4096)", f"4096*({text})"]
    monkeypatch.setattr("schemes.tableau.compose", None)
    for text in texts:
        try:
            found = schemes.get(text)
        except schemes.SchemeError as error:
            assert str(error).count("\n") <= 1 and len(str(error)) < 600
        else:
            assert found.stages <= MAX_FUNCTIONS and found.streams <= MAX_FUNCTIONS


def test_a_users_family_has_the_limit_too(monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))

    class Wide(RevNetCoupling):
        def __init__(self, n):
            super().__init__()
            self.stages = n

    schemes.register("wide", Wide)
    with pytest.raises(schemes.SchemeError, match=r"5000 residual functions a step; at most 4096"):
        schemes.get("wide(5000)")


# A false declaration is caught, whatever it is about.


class Honest(RevNetCoupling):
    """revnet under another name."""

    def __str__(self):
        return "honest"


class Slowed(Momentum):
    """momentum(1/2), with one thing declared falsely."""

    def __init__(self, **false):
        super().__init__(0.5)
        vars(self).update(false)

    def __str__(self):
        return "slowed"


class Exponential(Honest):
    """A scale that is computed from the streams."""

    stages = evaluations = 1
    exact = True
    nodes = (0.0,)

    raw = (False,)

    def slots(self, n, streams, out_channels=None):
        return (schemes.Slot(n, 0, streams[:1], streams[1]),)

    def shape_of(self, i, streams):
        return streams[1]

    def updates(self, fs, h, streams):
        return [Update(1, lambda s: (s[0].sigmoid() + 0.5, scaled(h, fs[0](s[0]))))]


class Doubling(Exponential):
    """Its inverse doubles, which it does not say."""

    def updates(self, fs, h, streams):
        return [Update(1, lambda s: (0.5, scaled(h, fs[0](s[0]))))]


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (Slowed(order=2), r"the error falls with order 1\.\d\d, want 2|order 0\.\d\d, want 2"),
        (Slowed(amplification=1.0), "a step amplifies by 2.000, declared is 1.000"),
        (Slowed(amplification=4.0), "a step amplifies by 2.000, declared is 4.000"),
        (Slowed(exact=False), "exact is False, but the scales of its updates are constant"),
        (Slowed(evaluations=2), "1 evaluations in step 0, not 2"),
        (Slowed(streams_added=1), "appends 0 streams, declared are 1"),
        (Slowed(streams=3), "declared are 3|streams"),
        (Slowed(byproducts=(1,)), "has by-products set\\(\\), declared are \\(1,\\)"),
        (Slowed(invertible=False), "says that it is not invertible, and has an inverse"),
        (Slowed(nodes=(0.5, 0.5)), "too many values to unpack"),
        (Exponential(), "exact is True, but the scales of its updates are not constant"),
        (Doubling(), "a step amplifies by 2.000, declared is 1.000"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_a_false_declaration_is_caught(scheme, message):
    with pytest.raises((AssertionError, ValueError), match=message):
        check_scheme(scheme)


def test_the_true_ones_are_not():
    check_scheme(Slowed())
    check_scheme(Honest())


@pytest.mark.parametrize("name", ["stages", "order", "nodes", "span", "streams", "invertible", "shortcuts", "exact"])
def test_a_wrapper_that_forgets_an_attribute_is_caught(name):
    wrapper = schemes.get("repeat(momentum(0.5), 1)")
    other = {"order": 3, "nodes": (0.7,), "invertible": False, "exact": False}.get(name, 7)
    vars(wrapper)[name] = other
    with pytest.raises((AssertionError, ValueError), match=name):
        check_wrapper(wrapper, schemes.get("momentum(0.5)"))


def test_a_wrapper_that_forgets_training_or_the_first_step_is_caught(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(schemes.compose.Composition, "training_scheme", Scheme.training_scheme)
        with pytest.raises(AssertionError, match="in training"):
            check_wrapper(schemes.get("repeat(bdia, 1)"), schemes.get("bdia"))
    with monkeypatch.context() as patch:
        patch.setattr(schemes.compose.Composition, "whole", lambda self, n: self)
        with pytest.raises(AssertionError, match=r"repeat\(leapfrog, 2\).*off by"):
            check_wrapper(schemes.get("repeat(leapfrog, 2)"), schemes.get("leapfrog"), n=2)
    with monkeypatch.context() as patch:
        patch.setattr(schemes.compose.Nested, "reversible_in_training", Scheme.reversible_in_training)
        with pytest.raises(AssertionError, match="reversible_in_training is False"):
            check_wrapper(schemes.get("nested(bdia, euler)"), schemes.get("bdia"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nested(rk4, bdia)", "cannot act as a residual function"),
        ("nested(rk4, repeat(bdia, 2))", "cannot act as a residual function"),
        ("nested(rk4, dense(3))", "cannot act as a residual function"),
        ("nested(rk4, revcol)", "cannot act as a residual function"),
        ("nested(dense(3), rk4)", "is given widths"),
        ("nested(additive(3), rk4)", "is given widths"),
        ("nested(multilevel(3), rk4)", "is given widths"),
        ("nested(affine, rk4)", "is given widths"),
        ("bdia + euler", "different streams in training"),
        ("euler + 2*bdia", "different streams in training"),
        ("dense(3) + euler", "different streams"),
        ("revcol + euler", "different streams"),
        ("reversible(bdia)", "in training too"),
        ("reversible(dense(3))", "one stream"),
    ],
)
def test_a_combination_that_cannot_be_right_is_refused_when_it_is_made(text, message):
    with pytest.raises(schemes.SchemeError, match=message) as caught:
        schemes.get(text)
    assert str(caught.value).count("\n") <= 1


def test_streams_that_no_step_can_move_are_refused():
    scheme = schemes.get("nested(revnet, midpoint)")
    fs = [torch.sin] * 4
    with pytest.raises(schemes.SchemeError, match="splits evenly"):
        scheme.init(fs, torch.zeros(2, 5))
    with pytest.raises(schemes.SchemeError, match="splits evenly"):
        scheme.slots(0, (3, 2))


def test_repeated_steps_amplify_together():
    assert schemes.get("repeat(momentum(0.5), 2)").amplification == 4.0
    assert schemes.get("nested(momentum(0.5), midpoint)").amplification == 2.0


def test_a_step_of_every_coupling_is_given_by_its_updates():
    """The base class writes step and inverse; no coupling of the package overrides them."""
    for cls in concrete(Coupling):
        assert cls._step is Coupling._step and cls._inverse is Coupling._inverse, cls.__name__


def test_steps_of_a_wrapper_are_numbered_through_in_training():
    seen = []

    class Numbered(schemes.Bdia):
        def training_scheme(self, n, x):
            seen.append(n)
            return super().training_scheme(n, x)

    x = torch.zeros(2, 3)
    schemes.Repeat(Numbered(), 3).at(2).training_scheme(2, x)
    schemes.Nested(schemes.Substeps(Numbered(), 2), schemes.get("midpoint")).training_scheme(1, x)
    assert seen == [6, 7, 8, 2, 3]


class Shared(Scheme):
    """Heun's method whose one residual function is evaluated at both ends of a step."""

    stages, evaluations, nodes = 1, 2, (0.0, 1.0)

    def _step(self, fs, state, h=1.0, gs=()):
        (x,), y = state, gs[0](state[0]) if gs else state[0]
        k = fs[0](x)
        return (y + h / 2 * (k + fs[-1](y + h * k)),)

    def __str__(self):
        return "shared"


def test_functions_that_are_evaluated_several_times_keep_their_times():
    euler, shared = schemes.get("euler"), Shared()
    for wrapper in (schemes.Nested(euler, shared), schemes.Nested(shared, euler), schemes.Repeat(shared, 1)):
        check_wrapper(wrapper, shared)
    check_wrapper(schemes.Nested(schemes.Repeat(euler, 2), shared), shared, n=2)
    check_wrapper(schemes.Substeps(shared, 3), shared, n=3, shorter=True)
