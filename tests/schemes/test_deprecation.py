"""Schemes written for 0.1 work, and say at their definition what is called how now."""

import importlib
import warnings

import pytest
import torch

import schemes
from schemes import Scheme, coupling
from schemes.testing import check_inverse

RENAMED = Scheme._RENAMED
HERE = __file__


def test_a_scheme_of_one_stream_written_for_0_1():
    with pytest.warns(DeprecationWarning, match=r"Leaky.advance is now _step; the old name goes in 0.3") as found:

        class Leaky(Scheme):
            stages = evaluations = 1
            nodes = (0.0,)

            def advance(self, fs, state, h=1.0, gs=()):
                (x,) = state
                return (0.5 * x + h * fs[0](x),)

            def __str__(self):
                return "leaky"

    assert [w.filename for w in found] == [HERE]  # the warning points at the class, not into the library
    x = torch.ones(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(Leaky().step([torch.neg], (x,))[0], -0.5 * x)
        assert torch.equal(Leaky()._step([torch.neg], (x,))[0], -0.5 * x)
        assert torch.equal(schemes.Repeat(Leaky(), 2)._step([torch.neg] * 2, (x,))[0], 0.25 * x)


def test_super_reaches_the_class_above_and_not_the_object_itself():
    with pytest.warns(DeprecationWarning, match=r"Halved\.\w+ is now"):

        class Halved(schemes.RevNetCoupling):
            def advance(self, fs, state, h=1.0, gs=()):
                return super().advance(fs, state, h / 2, gs)

            def retreat(self, fs, state, h=1.0, gs=()):
                return super().retreat(fs, state, h / 2, gs)

    fs, state = (torch.sin, torch.cos), (torch.ones(2), torch.zeros(2))
    with pytest.warns(DeprecationWarning, match=r"Halved.advance is now _step"):
        after = Halved().step(fs, state)
    want = schemes.get("revnet").step(fs, state, h=0.5)
    assert all(torch.equal(a, b) for a, b in zip(after, want, strict=True))
    with pytest.warns(DeprecationWarning, match=r"Halved.retreat is now _inverse"):
        back = Halved().inverse(fs, after)
    assert all(torch.allclose(a, b) for a, b in zip(back, state, strict=True))


def test_a_coupling_written_for_0_1():
    """Leapfrog, whose first step makes the second stream: attributes in the class, in ``__init__``, and of updates."""
    with pytest.warns(DeprecationWarning) as found:

        class Begin(schemes.Coupling):
            stages = evaluations = 1
            nodes = (0.0,)

            def __init__(self):
                self.made = 1

            def updates(self, fs, h, streams):
                return [coupling.Update(1, lambda s: (1.0, s[0] + h * fs[0](s[0])), makes=True)]

            def slots(self, n, streams, out_channels=None):
                return (schemes.Slot(n, 0, streams[-1:], streams[-1]),)

            def widths(self, n, streams, out_channels=None):
                return streams * 2

            def __str__(self):
                return "begin"

        class Later(Begin):
            turn = 1
            emitted = ()

            def __init__(self):
                pass

            def at(self, n):
                return self if n else Begin()

            def enter(self, y):
                return (y, y)

            def updates(self, fs, h, streams):
                return [coupling.Update(0, lambda s: (1.0, 2 * h * fs[0](s[1])))]

            def widths(self, n, streams, out_channels=None):
                return streams

            def __str__(self):
                return "later"

    assert sorted(str(w.message).split(";")[0] for w in found) == [
        "Later.emitted is now byproducts",
        "Later.enter is now state_from_output",
        "Later.turn is now rotate",
    ]
    assert (Later.rotate, Later().rotate, Later().streams_added) == (1, 1, 0)
    with pytest.warns(DeprecationWarning, match=r"Begin.made is now streams_added"):
        assert Begin().streams_added == 1
    with pytest.warns(DeprecationWarning, match="is now"):
        check_inverse(Later(), torch.randn(2, 4, dtype=torch.float64), steps=4)
    assert len(Later().state_from_output(torch.ones(1))) == 2


@pytest.mark.parametrize("old", RENAMED)
def test_every_old_name_is_read_with_a_warning_and_means_the_new_one(old):
    new = RENAMED[old]
    owner = schemes.get("multilevel(3)" if old != "emitted" else "reversible_heun")
    with pytest.warns(DeprecationWarning, match=rf"{old} is now {new}; the old name goes in 0.3"):
        value = getattr(owner, old)
        if callable(value):
            arguments = {
                "enter": (torch.ones(1, 3),),
                "origin": ((torch.ones(1, 3),) * 3,),
                "in_training": (0, torch.ones(1, 3)),
                "elementary": ([torch.sin], 1.0),
                "advance": ([lambda a, b: a], (torch.ones(1, 1),) * 3),
                "retreat": ([lambda a, b: a], (torch.ones(1, 1),) * 3),
            }[old]
            value(*arguments)
    if not callable(value):
        assert value == getattr(owner, new)


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("schemes", "RevCol", "RevColCoupling"),
        ("schemes", "RevNet", "RevNetCoupling"),
        ("schemes.columns", "RevCol", "RevColCoupling"),
        ("schemes.coupling", "RevNet", "RevNetCoupling"),
        ("schemes.coupling", "do", "apply_update"),
        ("schemes.coupling", "undo", "invert_update"),
        ("schemes.coupling", "turned", "rotated"),
    ],
)
def test_old_names_of_modules(module, old, new):
    found = importlib.import_module(module)
    with pytest.warns(DeprecationWarning, match=rf"{module}.{old} is now {module}.{new}"):
        assert getattr(found, old) is getattr(found, new)
    with pytest.raises(AttributeError, match="no attribute 'RevColumn'"):
        _ = found.RevColumn


def test_updates_refuse_what_neither_version_knows():
    with pytest.raises(TypeError, match="unexpected keyword 'drops'"):
        coupling.Update(0, lambda s: (1.0, s[1]), drops=True)
    with pytest.warns(DeprecationWarning, match="emit"):
        assert coupling.Update(0, lambda s: (1.0, s[1]), emit=2).byproduct == 2
