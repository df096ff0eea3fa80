"""Names: what is there, what can be added."""

import pytest
import torch

import schemes
from schemes import Repeat, RungeKutta, SchemeError, Tableau, catalogue, get, names, register, registry, tableaux
from schemes.testing import check_expression, check_formula


@pytest.fixture
def clean(monkeypatch):
    monkeypatch.setattr(registry, "_NAMES", dict(registry._NAMES))
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))


def test_every_method_and_family_has_a_name():
    assert set(tableaux.METHODS) | set(tableaux.FAMILIES) <= set(names())
    assert len(names()) == len(set(names()))


@pytest.mark.parametrize("name", tableaux.METHODS)
def test_every_name_is_a_scheme_with_exact_coefficients_and_a_source(name):
    scheme = get(name)
    t = scheme.tableau
    assert (str(scheme), t.name, t.stages) == (name, name, scheme.stages)
    assert len(t.cite) > 8 and t.order == scheme.order
    check_expression(name)


def test_a_tableau_can_be_registered(clean):
    register("my_heun", Tableau.parse("0 |\n 1 | 1\n | 1/2 1/2", order=2))
    assert get("my_heun").order == 2 and "my_heun" in names()
    check_expression("nested(my_heun, repeat(my_heun, 2))")
    check_formula(get("3*my_heun"))
    with pytest.raises(SchemeError, match="closest are my_heun"):
        get("my_huen")


def test_a_scheme_and_a_family_can_be_registered(clean):
    register("twice", Repeat(get("rk4"), 2))
    register("times", lambda scheme, n: Repeat(scheme, n))
    assert get("twice").stages == 8
    assert get("times(euler, n=3)").stages == 3
    with pytest.raises(SchemeError, match=r"times\(scheme, n\)"):
        get("times(euler)")
    with pytest.raises(SchemeError, match="repeat: the count is 0"):
        get("times(euler, 0)")


def test_a_family_whose_arguments_all_have_defaults_needs_no_brackets():
    assert get("ees25") == get("ees25()")
    with pytest.raises(SchemeError, match="'s'"):
        get("rkc1")


@pytest.mark.parametrize("name", ["", "rk 4", "4rk", "rk-4", "true", "None", "lambda", "for", "é", 4, None])
def test_names_that_no_expression_can_say(name, clean):
    with pytest.raises(SchemeError, match="cannot register"):
        register(name, get("rk4"))


@pytest.mark.parametrize("name", ["rk4", "nested", "ees25"])
def test_taken_names(name, clean):
    with pytest.raises(SchemeError, match="the name is taken"):
        register(name, get("rk4"))


def test_what_is_no_scheme(clean):
    with pytest.raises(SchemeError, match="want a Scheme, a Tableau or a function"):
        register("mine", 4)


def test_catalogue():
    rows = {row.name: row for row in catalogue()}
    assert set(tableaux.METHODS) <= set(rows)
    assert {schemes.examples(family)[0] for family in tableaux.FAMILIES} <= set(rows)
    rk4 = rows["rk4"]
    assert (rk4.stages, rk4.order, rk4.companion, rk4.mixing, rk4.exact) == (4, 4, None, 1.0, True)
    assert rk4.real == pytest.approx(2.7853, abs=1e-3) and rk4.imaginary == pytest.approx(2.8284, abs=1e-3)
    assert rows["verner8"].mixing == pytest.approx(2307, abs=1)
    assert rows["verner89"].companion == 9


def test_equality_and_hash():
    assert get("rk4") == get("rk4") != get("rk38")
    assert len({get("2*rk4"), get("2*rk4"), get("repeat(rk4, 2)")}) == 2
    assert isinstance(get("rk4"), RungeKutta) and repr(get("2*rk4")) == "<scheme 2*rk4>"
    assert schemes.get("rk4") != "rk4"


class Half(schemes.Scheme):
    """x' = x + h/2 (f0(x) + f1(x)), with attributes that a test sets or leaves out."""

    def _step(self, fs, state, h=1.0, gs=()):
        (x,) = state
        return (x + h / 2 * (fs[0](x) + fs[1](x)),)

    def __str__(self):
        return "half"


WRONG = [
    ({}, "Half does not set stages"),
    ({"stages": "two"}, "Half sets stages to 'two'"),
    ({"stages": 0}, "Half sets stages to 0"),
    ({"stages": True}, "Half sets stages to True"),
    ({"stages": 2, "nodes": (0.0,)}, "Half sets 1 nodes for 2 residual functions"),
]


@pytest.mark.parametrize("attributes, said", WRONG)
def test_a_class_that_does_not_say_what_a_step_takes_is_refused_wherever_it_comes_in(attributes, said, clean):
    made = type("Half", (Half,), attributes)
    register("half", made)
    ways = [lambda: get(made()), lambda: get("half()"), lambda: Repeat(made(), 2), lambda: get("repeat(half(), 2)")]
    for take in (*ways, lambda: register("other", made())):
        with pytest.raises(SchemeError, match=said) as e:
            take()
        assert len(str(e.value).splitlines()) == 2
    assert "other" not in names()


def test_without_nodes_functions_of_time_are_refused():
    made = type("Half", (Half,), {"stages": 2})()
    x = torch.ones(3)
    assert torch.equal(schemes.solve(made, lambda x: x, x, steps=1), 2 * x)
    with pytest.raises(SchemeError, match=r"sets no nodes.*\n  Set nodes"):
        schemes.solve(made, lambda t, x: t * x, x, steps=1)
