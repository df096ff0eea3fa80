"""One look for each name in all figures, told apart by colour-blind readers."""

import itertools

import matplotlib.figure
import pytest

import schemes
from odenets import plots
from odenets.palette import COLOURS, DASHES, MODELS, SCHEMES, Look, look, looks


def test_names_of_the_table_are_schemes_and_looks_are_distinct():
    for name in SCHEMES:
        assert name in schemes.names(), name
    assert len({look(n)[::2] for n in range(len(COLOURS) * len(DASHES))}) == len(COLOURS) * len(DASHES)
    assert len(SCHEMES) <= len(COLOURS) * len(DASHES) and len(MODELS) <= len(COLOURS) * len(DASHES)


def test_a_name_has_one_look_whoever_is_beside_it():
    for name in SCHEMES:
        for others in ([], ["mine"], ["mine", "yours", "theirs"], [s for s in SCHEMES if s != name]):
            found = looks([*others, name])
            assert found[name] == looks([name])[name], (name, others)
            assert len(set(found.values())) == len(found)
    assert looks(["scheme=rk4, step=1.0"]) == {"scheme=rk4, step=1.0": looks(["rk4"])["rk4"]}
    assert looks(["add"])["add"] == looks(["euler"])["euler"]
    assert looks(["ho_resnet26"])["ho_resnet26"] == looks(["ho_resnet"])["ho_resnet"] != looks(["resnet20"])["resnet20"]
    assert len(set(looks([f"name {i}" for i in range(20)]).values())) == 20


def test_a_second_quantity_is_dashed():
    found = looks(["add: width", "add: rank", "concat: width", "concat: rank"])
    assert found["add: width"].colour == found["add: rank"].colour != found["concat: rank"].colour
    assert [x.dash for x in found.values()] == ["-", "--", "-", "--"]


def test_cells_of_one_scheme_have_its_colour():
    names = [f"scheme={scheme}, step={step}" for scheme in ("euler", "rk4") for step in ("1.0", "learned")]
    found = looks(names)
    assert [x.colour for x in found.values()] == [looks([s])[s].colour for s in ("euler", "euler", "rk4", "rk4")]
    assert [x.dash for x in found.values()] == ["-", "--", "-", "--"]
    # kutta3 is dashed itself, in the colour of rk4: what differs in no way is told apart as other names are.
    names += [f"scheme=kutta3, step={step}" for step in ("1.0", "learned")]
    assert len(set(looks(names).values())) == len(names)


@pytest.mark.parametrize("draw", ["lines", "bands"])
def test_figures_take_looks_from_the_palette(draw, tmp_path, monkeypatch):
    """Drawn lines have the colour and the dash of their names."""
    drawn = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, *a, **k: drawn.append(self))
    names = ["mine", "rk4", "euler"]
    if draw == "lines":
        plots.lines({n: ([1, 2], [3, 4]) for n in names}, tmp_path / "x.png", "x", "y")
    else:
        plots.bands({n: [[(1.0, 2.0), (2.0, 3.0)]] for n in names}, tmp_path / "x.png", "x", "y")
    (axes,) = drawn[0].axes
    want = looks(names)
    got = {line.get_label().partition(" (")[0]: (line.get_color(), line.get_linestyle()) for line in axes.lines}
    assert got == {name: (want[name].colour, want[name].dash) for name in names}


def simulated(colour: str, kind: str) -> tuple[float, float, float]:
    """What a reader without red, or without green, cones sees of a colour: Vienot, Brettel and Mollon 1999."""
    levels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in levels]
    to_lms = ((17.8824, 43.5161, 4.11935), (3.45565, 27.1554, 3.86714), (0.0299566, 0.184309, 1.46709))
    lms = [sum(a * x for a, x in zip(row, linear, strict=True)) for row in to_lms]
    if kind == "red":
        lms[0] = 2.02344 * lms[1] - 2.52581 * lms[2]
    else:
        lms[1] = 0.494207 * lms[0] + 1.24827 * lms[2]
    back = (
        (0.0809444479, -0.130504409, 0.116721066),
        (-0.0102485335, 0.0540193266, -0.113614708),
        (-0.000365296938, -0.00412161469, 0.693511405),
    )
    seen = [min(1.0, max(0.0, sum(a * x for a, x in zip(row, lms, strict=True)))) for row in back]
    r, g, b = (12.92 * x if x <= 0.0031308 else 1.055 * x ** (1 / 2.4) - 0.055 for x in seen)
    return r, g, b


@pytest.mark.parametrize("kind", ["red", "green"])
def test_colours_differ_for_colour_blind_readers(kind):
    for a, b in itertools.combinations(COLOURS, 2):
        x, y = simulated(a, kind), simulated(b, kind)
        assert max(abs(u - v) for u, v in zip(x, y, strict=True)) > 0.1, (a, b)
    one, other = simulated("#b25c00", kind), simulated("#737300", kind)  # a pair that such readers take for one
    assert max(abs(u - v) for u, v in zip(one, other, strict=True)) < 0.05


def test_a_look_says_what_it_is():
    assert Look("#000000", "o", "-").colour == "#000000"
