"""The common corruptions against the published code, written once more picture by picture."""

import numpy as np
import pytest
import torch

from odenets.evaluation import corruptions
from odenets.evaluation.corruptions import CONSTANTS, KINDS, STRENGTHS, corrupt, protocol_of
from odenets.evaluation.filters import correlate
from odenets.evaluation.textures import Draws, plasma
from odenets.seeds import seed_of
from schemes import SchemeError

from . import published

PROTOCOLS = ("cifar", "imagenet")
SIDE = {
    "cifar": 32,
    "imagenet": 48,
}  # the constants' own meaning does not depend on the size, but for elastic_transform


def smooth(n, side, channels=3, seed=0):
    """Pictures with edges, colours and flat parts: what noise alone would not show."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    g = torch.Generator().manual_seed(seed)
    a = torch.rand(n, channels, 4, 1, 1, generator=g)
    x = (0.5 + 0.5 * torch.sin(9 * a[:, :, 0] * rows + 12 * a[:, :, 1] * columns + 6 * a[:, :, 2])) * a[:, :, 3]
    x[:, :, : side // 4, : side // 4] = 0  # black: it has no hue
    x[:, :, side // 2 :, side // 2 :] = 1 - x[:, :, side // 2 :, side // 2 :]
    return (255 * x).round().to(torch.uint8)


@pytest.fixture
def uncut(monkeypatch):
    """`corrupt` in floats: a level that lies on an edge is cut either way by the last digit of a sum."""
    monkeypatch.setattr(corruptions, "_cut", lambda x: x.clamp(0, 1))
    return corruptions.corrupt


def plain(x, name, strength, index, protocol, *others):
    """(c, h, w) in [0, 1], by the published text."""
    c = published.LISTS[name][PROTOCOLS.index(protocol)][strength - 1]
    if name == "elastic_transform":
        c = tuple(value * x.shape[-1] / {"cifar": 32, "imagenet": 224}[protocol] for value in c)
    d = published.One(Draws([seed_of(0, name, strength, index)]))
    levels = x.permute(1, 2, 0).double().numpy() / 255
    function = getattr(published, "frost_photograph" if name == "frost" else name)
    return torch.from_numpy(np.clip(function(levels, c, d, *others), 0, 1)).permute(2, 0, 1)


# These cut or round to levels on the way, where the last digit of a sum decides between two.
ROUNDED = {"glass_blur": 0.2, "snow": 0.001, "motion_blur": 0.001, "frost": 0.02}


def agree(found, wanted, name):
    far = (found - wanted).abs()
    assert float((far > 2e-6).double().mean()) <= ROUNDED.get(name, 0), (
        f"{name}: {float((far > 2e-6).double().mean()):.2%}"
    )
    assert float(far.max()) < 1.1 / 255, f"{name}: {float(far.max())}"


@pytest.mark.cases(30)
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", [name for name in KINDS if name != "frost"])
def test_a_corruption_is_the_published_one(uncut, name, protocol, strength):
    x = smooth(2, SIDE[protocol], seed=strength)
    found = uncut(x, name, strength, indices=[3, 11], protocol=protocol)
    assert float((found - x / 255).abs().mean()) > 1e-4
    for i, index in enumerate((3, 11)):
        agree(found[i], plain(x[i], name, strength, index, protocol), name)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_frost_with_photographs_is_the_published_one(uncut, protocol):
    shrink = 0.2 if protocol == "cifar" else 1.0
    side = 223 if protocol == "cifar" else 60  # a fifth of it is no whole number
    x, photographs = smooth(2, SIDE[protocol]), list(smooth(6, side, seed=5))
    found = uncut(x, "frost", 2, indices=[0, 4], protocol=protocol, frost=photographs)
    arrays = [p.permute(1, 2, 0).numpy() for p in photographs]
    for i, index in enumerate((0, 4)):
        agree(found[i], plain(x[i], "frost", 2, index, protocol, arrays, shrink), "frost")
    with pytest.raises(SchemeError, match="photograph"):
        corrupt(x, "frost", 2, frost=[p[:, :20, :20] for p in photographs])


def test_the_constants_are_those_that_were_published():
    assert CONSTANTS.keys() == KINDS.keys() == published.LISTS.keys()
    for name, lists in published.LISTS.items():
        for protocol, values in zip(PROTOCOLS, lists, strict=True):
            for ours, theirs in zip(CONSTANTS[name][protocol], values, strict=True):
                if name == "zoom_blur":
                    continue  # a stop and a step there; the pictures above agree only if the factors do
                assert np.allclose(ours, theirs, rtol=1e-12), (name, protocol)


@pytest.mark.parametrize("name", KINDS)
def test_random_numbers_are_a_picture_s_own(name):
    """Not the batch's: any order, any batch size; another picture, another strength, another seed differ."""
    x = smooth(1, 32).expand(4, -1, -1, -1)
    whole = corrupt(x, name, 3, indices=[0, 1, 2, 3])
    assert torch.equal(whole[[2, 0]], corrupt(x[:2], name, 3, indices=[2, 0]))
    state = torch.random.get_rng_state()
    random = not torch.equal(whole[0], whole[1])
    assert random == (
        name not in {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
    )
    assert random != torch.equal(whole, corrupt(x, name, 3, seed=1))
    assert torch.equal(state, torch.random.get_rng_state())


TYPES = [np.int64, np.uint8, torch.tensor, lambda n: torch.tensor([n], dtype=torch.int16)]


@pytest.mark.parametrize("kind", TYPES)
def test_seeds_do_not_depend_on_the_types_of_numbers(kind):
    want = seed_of(2, "fog", 1)
    assert want == 3061148245470756632  # figures that were published follow from it
    assert seed_of(kind(2), np.str_("fog"), kind(1)) == want
    x = smooth(2, 16)
    one = corrupt(x, "gaussian_noise", 2, [3, 4], seed=5)
    places = [kind(3), kind(4)]
    assert torch.equal(one, corrupt(x, np.str_("gaussian_noise"), kind(2), places, seed=kind(5)))
    assert torch.equal(one, corrupt(x, "gaussian_noise", 2, torch.tensor([3, 4]), seed=5))
    assert torch.equal(one, corrupt(x, "gaussian_noise", 2, np.array([3, 4]), seed=5))


@pytest.mark.parametrize(
    "part", [True, 2.0, None, np.True_, np.float32(2), torch.tensor(True), torch.tensor(2.0), torch.arange(2), (1, 2)]
)
def test_what_is_no_whole_number_gives_no_seed(part):
    with pytest.raises(SchemeError, match="whole numbers and texts, not from") as stop:
        seed_of(0, part)
    assert len(str(stop.value).splitlines()) == 2
    x = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    for given in ({"strength": part}, {"strength": 1, "seed": part}, {"strength": 1, "indices": [part]}):
        with pytest.raises(SchemeError, match="whole number"):
            corrupt(x, "fog", **given)


ALL = slice(None)


@pytest.mark.parametrize(
    "kept", [(ALL, ALL), (2, ALL), (ALL, 2), (0, ALL), (ALL, 4), (2, 2), (1, 3), (ALL, slice(2, 4))]
)
def test_kernels_with_zeros_anywhere(kept):
    g = torch.Generator().manual_seed(0)
    x, values = torch.rand(2, 3, 12, 10, generator=g), torch.rand(5, 5, generator=g)
    kernel = torch.zeros(5, 5)
    kernel[kept] = values[kept]
    wide = torch.nn.functional.pad(x, (2,) * 4, mode="reflect")
    want = [kernel[i, j] * wide[..., i : i + 12, j : j + 10] for i in range(5) for j in range(5)]
    torch.testing.assert_close(correlate(x, kernel), torch.stack(want).sum(0))


@pytest.mark.parametrize("name", KINDS)
def test_pictures_of_any_size(name):
    for shape in ((1, 1), (1, 9), (9, 1), (2, 3)):
        for strength in (1, 5):
            assert corrupt(smooth(1, 9)[..., : shape[0], : shape[1]], name, strength).shape == (1, 3, *shape)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 20, 33), (1, 33, 20)])
def test_grey_and_oblong_pictures(shape):
    """Every corruption keeps the shape; of three equal channels it makes what it makes of the grey picture."""
    x = torch.randint(0, 256, (2, *shape), dtype=torch.uint8)
    for name in KINDS:
        y = corrupt(x, name, 2)
        assert y.shape == x.shape and y.dtype == torch.uint8, name
        if shape[0] == 1 and name not in ("gaussian_noise", "shot_noise", "impulse_noise", "frost", "jpeg_compression"):
            coloured = corrupt(x.expand(-1, 3, -1, -1), name, 2)[:, :1]
            assert int((coloured.int() - y.int()).abs().max()) <= 1, name


def test_levels_are_cut_and_not_rounded():
    x = torch.full((1, 1, 4, 4), 128, dtype=torch.uint8)
    assert int(corrupt(x, "brightness", 1)[0, 0, 0, 0]) == int(128 + 0.05 * 255) == 140  # 140.75


def test_plasma_is_on_a_torus_and_from_0_to_1():
    z = plasma(Draws([5]), 16, 2.0)
    assert float(z.min()) == 0 and float(z.max()) == 1
    assert np.allclose(z[0].numpy(), published.fractal(published.One(Draws([5])), 16, 2.0), atol=1e-12)
    with pytest.raises(ValueError, match="power of 2"):
        plasma(Draws([5]), 12, 2.0)


def test_the_protocol_follows_the_size():
    assert [protocol_of(*size) for size in ((8, 8), (32, 32), (96, 300), (97, 224))] == ["cifar"] * 3 + ["imagenet"]
    x = smooth(1, 128)
    assert torch.equal(corrupt(x, "contrast", 1), corrupt(x, "contrast", 1, protocol="imagenet"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.rand(1, 3, 8, 8)}, "uint8"),
        ({"x": torch.zeros(1, 2, 8, 8, dtype=torch.uint8)}, "1 or 3"),
        ({"x": torch.zeros(0, 3, 8, 8, dtype=torch.uint8)}, "uint8"),
        ({"name": "spatter"}, "no corruption"),
        ({"strength": 0}, "from 1 to 5"),
        ({"strength": 6}, "from 1 to 5"),
        ({"protocol": "svhn"}, "cifar, imagenet"),
        ({"indices": [0, 1]}, "one each"),
    ],
)
def test_what_does_not_go_is_refused(change, said):
    given = {"x": torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "name": "fog", "strength": 1, **change}
    with pytest.raises(SchemeError, match=said):
        corrupt(**given)
