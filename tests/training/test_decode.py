"""Every kind of picture as PIL shows it, or by its stated meaning; and those that cannot be read."""

import io
import math
import struct
import traceback
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from odenets.training import DataError, Images
from odenets.training.data import Cached, Decoded, Tally, middle_box
from odenets.training.decode import Picture, Unreadable, random_box
from odenets.training.splits import open_splits

from .pictures import picture, write_folder

INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def stored(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def levels(x: Image.Image | torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.array(x)).int() if isinstance(x, Image.Image) else x.int()


def muted(size: tuple[int, int]) -> Image.Image:
    """Noise of middle levels: where bicubic overshoots 0 or 255, PIL's result depends on the axis it begins with."""
    return picture(1, size).point([70 + v * 115 // 255 for v in range(256)] * 3)


def equal_but_for_rounding(a, b) -> bool:
    """Each of the two passes of a resize rounds to a level."""
    apart = (levels(a) - levels(b)).abs()
    return int(apart.max()) <= 2 and float(apart.float().mean()) <= 0.5


def natural(width: int, height: int) -> Image.Image:
    """Shades as photographs have them: the finer, the fainter."""
    rng, total = np.random.default_rng(width), np.zeros((height, width, 3))
    for k, share in ((3, 0.6), (9, 0.3), (27, 0.1)):
        small = Image.fromarray(rng.integers(0, 256, (k, k, 3), dtype=np.uint8))
        total += share * np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), float)
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


@st.composite
def boxes(draw):
    width, height = draw(st.integers(2, 60)), draw(st.integers(2, 60))
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return (width, height), (left, top, draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height)))


@given(boxes(), st.integers(1, 40), st.sampled_from(list(INTERPOLATIONS)))
def test_a_cut_is_pils_crop_and_resize_to_rounding(drawn, size, how):
    whole, box = drawn
    image = muted(whole)
    expected = image.crop(box).resize((size, size), INTERPOLATIONS[how])
    assert equal_but_for_rounding(Picture(stored(image)).cut(box, size, how), expected)


@given(boxes(), st.integers(1, 40), st.floats(0.5, 1), st.sampled_from(list(INTERPOLATIONS)))
def test_the_middle_is_pils_resize_and_centre_crop_to_rounding(drawn, size, inner, how):
    (width, height), _ = drawn
    image, short = muted((width, height)), max(size, math.floor(size / inner))
    long = short * max(width, height) // min(width, height)
    shape = (short, long) if width <= height else (long, short)
    left, top = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
    expected = image.resize(shape, INTERPOLATIONS[how]).crop((left, top, left + size, top + size))
    assert equal_but_for_rounding(Picture(stored(image)).middle(size, inner, how), expected)


def test_the_middle_shows_the_middle_box():
    for width, height in ((500, 375), (375, 500), (301, 300)):
        a = np.zeros((height, width, 3), np.uint8)
        a[..., 0], a[..., 1] = np.linspace(0, 255, width), np.linspace(0, 255, height)[:, None]
        x = Picture(stored(Image.fromarray(a))).middle(100, 0.875, "bilinear").float()
        left, top, right, bottom = middle_box(width, height, 100 / 114)
        pixel = (right - left) / 100
        seen = x[50, [0, -1], 0] / 255 * width, x[[0, -1], 50, 1] / 255 * height
        for ends, (low, high) in zip(seen, ((left, right), (top, bottom)), strict=True):
            assert ends[0] == pytest.approx(low + pixel / 2, abs=1.5 * pixel)
            assert ends[1] == pytest.approx(high - pixel / 2, abs=1.5 * pixel)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(kind, orientation):
    image = natural(90, 60)
    exif = image.getexif()
    exif[274] = orientation
    data = stored(image, kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert Picture(data).size == upright.size and torch.equal(levels(Picture(data).rgb()), levels(upright))
    box = (5, 9, 41, 55)
    expected = levels(upright.crop(box).resize((32, 32), INTERPOLATIONS["bilinear"]))
    assert (levels(Picture(data).cut(box, 32, "bilinear")) - expected).abs().max() <= 1
    plain = stored(upright.copy())
    middle = levels(Picture(plain).middle(32, 0.8, "bicubic"))
    assert (levels(Picture(data).middle(32, 0.8, "bicubic")) - middle).abs().max() <= 1
    if kind == "JPEG":  # and where it is decoded at a part of its size
        size = 7
        whole = upright.crop((1, 2, 58, 59)).resize((size, size), INTERPOLATIONS["bilinear"])
        assert (levels(Picture(data).cut((1, 2, 58, 59), size, "bilinear")) - levels(whole)).abs().float().mean() < 4


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_an_orientation_that_xmp_alone_tells_is_followed(kind):
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = stored(natural(90, 60), kind, xmp=packet)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == (60, 90)
    assert torch.equal(levels(Picture(data).rgb()), levels(upright))


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_a_jpeg_decoded_at_a_part_of_its_size_shows_the_same(scale):
    size = 56
    image = natural(2 * size * scale + 37, 2 * size * scale + 21)
    data = stored(image, "JPEG", quality=92)
    whole, box = Image.open(io.BytesIO(data)).convert("RGB"), (13, 5, 13 + 2 * size * scale, 11 + 2 * size * scale)
    cut = Picture(data)
    apart = (levels(cut.cut(box, size, "bilinear")) - levels(whole.crop(box).resize((size, size), 2))).abs().float()
    assert cut.image.size == tuple(-(-side // scale) for side in image.size)
    assert apart.mean() < 0.5 and apart[2:-2, 2:-2].max() <= 3 and apart.max() <= 12
    middle = levels(Picture(data).middle(size, 1.0, "bilinear"))
    full = levels(Picture(stored(whole)).middle(size, 1.0, "bilinear"))
    assert (middle - full).abs().float().mean() < 0.7


def test_a_real_jpeg_decoded_at_a_part_of_its_size_shows_the_same(data_root):
    for path in sorted((data_root / "imagenet_sample").glob("*/*"))[:8]:
        original = Image.open(path).convert("RGB")
        data = stored(original.resize((4 * original.width, 4 * original.height), 3), "JPEG", quality=90)
        box = (9, 7, 9 + 900, 7 + 910)
        whole = Image.open(io.BytesIO(data)).convert("RGB").crop(box).resize((224, 224), 2)
        apart = (levels(Picture(data).cut(box, 224, "bilinear")) - levels(whole)).abs().float()
        assert apart.mean() < 0.5 and apart[2:-2, 2:-2].max() <= 6


# --- what a kind of picture means -------------------------------------------------------------------------------------


def grey(data: bytes) -> list[int]:
    x = levels(Picture(data).rgb())
    assert torch.equal(x[..., 0], x[..., 1]) and torch.equal(x[..., 0], x[..., 2])
    return x[0, :, 0].tolist()


RAMP = list(range(0, 256, 17))
DEEP = {
    "16 bits": (np.arange(16) * 4369).astype(np.uint16),
    "32 bits of 16": (np.arange(16) * 4369).astype(np.int32),
    "32 bits of 8": (np.arange(16) * 17).astype(np.int32),
    "32 bits": (np.arange(16) * ((2**31 - 1) / 15)).astype(np.int32),
    "floats to 1": np.linspace(0, 1, 16, dtype=np.float32),
    "floats to 255": np.linspace(0, 255, 16, dtype=np.float32),
    "floats to 65535": np.linspace(0, 65535, 16, dtype=np.float32),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_grey_keeps_its_range(name):
    row = DEEP[name]
    image = Image.fromarray(np.tile(row.astype(row.dtype), (2, 1)))
    assert grey(stored(image, "TIFF")) == RAMP
    if name == "16 bits":
        assert grey(stored(image)) == RAMP


def test_unsigned_32_bits_keep_their_range():
    values = (np.arange(16) * ((2**32 - 1) / 15)).astype("<u4")
    tags = [
        (256, 3, 16),
        (257, 3, 1),
        (258, 3, 32),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (278, 3, 1),
        (279, 4, 64),
        (339, 3, 1),
    ]
    head = struct.pack("<2sHI", b"II", 42, 8 + 64)
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    assert grey(head + values.tobytes() + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0") == RAMP


@pytest.mark.parametrize("row", [[0.0, math.nan], [0.0, math.inf], [-1.0, 1.0], [0.0, 1e9]])
def test_floats_that_are_no_levels_are_unreadable(row):
    with pytest.raises(Unreadable, match="levels"):
        Picture(stored(Image.fromarray(np.array([row], np.float32)), "TIFF")).rgb()


def test_what_is_transparent_shows_white():
    rgba = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    rgba.putpixel((1, 0), (200, 0, 0, 0))
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.putpixel((1, 0), 1)
    palettes = [stored(palette, kind, transparency=1) for kind in ("PNG", "GIF")]
    two = Image.new("LA", (2, 1), (77, 255))
    two.putpixel((1, 0), (0, 0))
    for data, opaque in [(stored(rgba), [200, 0, 0]), (stored(two), [77] * 3), *((p, [200, 0, 0]) for p in palettes)]:
        assert levels(Picture(data).rgb())[0].tolist() == [opaque, [255] * 3]
    rgba.putpixel((1, 0), (0, 0, 0, 51))
    assert levels(Picture(stored(rgba)).rgb())[0, 1].tolist() == [204] * 3


def test_cmyk_palette_one_bit_and_grey_as_pil_shows_them():
    image = natural(40, 30)
    for data in (
        stored(image.convert("CMYK"), "JPEG", quality=95),
        stored(image.convert("CMYK"), "TIFF"),
        stored(image.quantize(16)),
        stored(image.convert("1")),
        stored(image.convert("L")),
    ):
        assert torch.equal(levels(Picture(data).rgb()), levels(Image.open(io.BytesIO(data)).convert("RGB")))


def test_of_several_frames_the_first_counts():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    for kind in ("GIF", "TIFF", "WEBP", "PNG"):
        data = stored(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert levels(Picture(data).rgb())[0, 0].tolist() == [255, 0, 0]


# --- what cannot be read ----------------------------------------------------------------------------------------------


def bomb() -> bytes:
    def chunk(kind: bytes, held: bytes) -> bytes:
        return struct.pack(">I", len(held)) + kind + held + struct.pack(">I", zlib.crc32(kind + held))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"x")
    )


JPEG = stored(natural(120, 120), "JPEG")
WRONG = {
    "truncated.jpg": JPEG[: len(JPEG) // 2],
    "empty.png": b"",
    "text.jpg": b"<html>404 not found</html>",
    "bomb.png": bomb(),
    "half.png": stored(picture(0))[:-300],
    "header.jpg": JPEG[:4],
    "damaged.png": stored(picture(0)).replace(b"IDAT", b"IDAX"),
    "vector.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_whole_picture_is_unreadable(name):
    with pytest.raises(Unreadable):
        Picture(WRONG[name]).rgb()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [12, 20])  # Pillow itself warns of the first, and refuses the second
def test_a_picture_of_too_many_pixels_is_unreadable(monkeypatch, side):
    data = stored(picture(0, (side, side)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Unreadable, match="pixels"):
        Picture(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert Picture(data).size == (side, side)


def with_wrong_ones(root: Path, size: tuple[int, int], names=tuple(WRONG)) -> Path:
    write_folder(root / "train", 6, 2, size)
    write_folder(root / "val", 2, 2, size)
    for name in names:
        (root / "train/n0000" / name).write_bytes(WRONG[name])
    (root / "train/n0000/._0.jpeg").write_bytes(b"a resource fork")  # hidden: no picture at all
    return root


@pytest.mark.parametrize("size, workers", [((32, 32), 0), ((120, 110), 0), ((120, 110), 2)])
def test_unreadable_pictures_are_named_and_replaced(tmp_path, size, workers, recwarn):
    import warnings

    warnings.simplefilter("always")
    data = Images(str(with_wrong_ones(tmp_path, size)), size=32, num_workers=workers, batch_size=5)
    data.setup("fit")
    train = data.sets["train"]
    batches = list(data.train_dataloader())
    assert all(x.shape == (5, 3, 32, 32) for x, _ in batches)
    if isinstance(train, Decoded):
        for i in range(len(train)):
            train[i]
        named = [train.name(i) for i in range(len(train)) if "unreadable" in train.name(i)]
        assert len(train) == 20 and len(named) == len(WRONG) and int(train.tally.seen.sum()) == len(WRONG)
        bad = next(i for i in range(len(train)) if "empty.png" in train.name(i))
        assert torch.equal(train[(3, bad)][0], train[(3, bad)][0])
        # Whichever takes its place is not shown twice with the same box in an epoch.
        wide = next(i for i in range(bad + 1, bad + len(train)) if "unreadable" not in train.name(i % len(train)))
        if train.smallest:
            assert not torch.equal(train[(3, bad)][0], train[(3, wide % len(train))][0])
    else:
        assert len(train) == 12 and not any("empty" in train.name(i) for i in range(12))
    if workers == 0:
        told = " ".join(str(w.message) for w in recwarn)
        assert all(told.count(f"{name} cannot be read") == 1 for name in WRONG)


@pytest.mark.parametrize("size, workers", [((32, 32), 0), ((120, 110), 0), ((120, 110), 1)])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_too_many_unreadable_pictures_end_the_run_with_their_list(tmp_path, size, workers):
    data = Images(str(with_wrong_ones(tmp_path, size)), size=32, num_workers=workers, batch_size=5, max_unreadable=3)
    with pytest.raises(DataError) as e:
        data.setup("fit")
        for _ in range(3):
            list(data.train_dataloader())
    text = str(e.value)
    # Frames of its traceback hold it and the loader: collected in a cycle, that one waits five seconds for its worker.
    traceback.clear_frames(e.tb)
    del e
    assert len(text.splitlines()) == 2 and "4 pictures cannot be read" in text and "data.max_unreadable=3" in text
    assert sum(name in text for name in WRONG) == 4


def test_a_set_of_unreadable_pictures_only(tmp_path):
    for kind in ("train/a", "train/b"):
        (tmp_path / kind).mkdir(parents=True)
        (tmp_path / kind / "x.png").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(DataError, match="none of 1 pictures"):
        Images(str(tmp_path)).setup("fit")


# --- one way for every picture ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(120, 90), (80, 60), (32, 32)])
@pytest.mark.parametrize("options", [{}, {"smallest_crop": 0.3}, {"inner": 0.7, "interpolation": "bicubic"}])
def test_what_is_shown_does_not_depend_on_the_cache(tmp_path, size, options):
    write_folder(tmp_path / "train", 3, 2, size)
    write_folder(tmp_path / "val", 2, 2, size)
    seen = []
    for cache in (True, False):
        data = Images(str(tmp_path), size=32, cache=cache, num_workers=0, **options)
        data.setup("fit")
        for part in data.sets.values():
            part.seed = 5
        seen.append([data.sets[name][(2, i)][0] for name in ("train", "val") for i in range(4)])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_a_pair_draws_by_seed_epoch_and_index_and_an_index_by_the_global_generator(tmp_path):
    write_folder(tmp_path, 4, 2, (120, 90))
    source = open_splits(tmp_path)["train"]
    data = Decoded(source, torch.arange(8), 16, True, 0.08, 0.875)
    state = torch.get_rng_state()
    first = data.__getitems__([(1, 3), (1, 4), (2, 3)])[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(data[(1, 3)][0], first[0]) and not torch.equal(first[0], first[2])
    data.seed += 1
    assert not torch.equal(data[(1, 3)][0], first[0])
    torch.manual_seed(7)
    a = data[3][0]
    torch.manual_seed(7)
    assert torch.equal(data[3][0], a) and not torch.equal(data[3][0], a)


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.01, 1), st.integers(0, 2**31))
def test_random_boxes_are_whole_pixels_inside_with_their_area_and_aspect(width, height, smallest, seed):
    left, top, right, bottom = random_box(width, height, smallest, generator=torch.Generator().manual_seed(seed))
    w, h = right - left, bottom - top
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    # Rounding moves each side by half a pixel; the middle box is as large as the aspect allows.
    assert (w + 0.5) * (h + 0.5) >= min(smallest, 0.75 * min(width / height, height / width)) * width * height * 0.99
    assert (w - 0.5) / (h + 0.5) <= 4 / 3 and (w + 0.5) / (h - 0.5) >= 3 / 4


def test_names_go_with_the_pictures(tmp_path):
    write_folder(tmp_path / "train", 2, 2, (40, 40))
    write_folder(tmp_path / "test", 2, 2, (40, 40))
    for cache in (True, False):
        data = Images(str(tmp_path), cache=cache, num_workers=0)
        data.setup("predict")
        assert isinstance(data.sets["predict"], Cached if cache else Decoded)
        assert [data.sets["predict"].name(i) for i in (0, 3)] == ["test/n0000/0.jpeg", "test/n0001/1.jpeg"]


def test_a_tally_counts_a_picture_once(tmp_path):
    write_folder(tmp_path, 2, 2, (40, 40))
    tally = Tally(open_splits(tmp_path)["train"], 1)
    with pytest.warns(UserWarning, match=r"0\.jpeg cannot be read \(torn\)"):
        tally.add(0, Unreadable("torn"), "gone")
    tally.add(0, Unreadable("torn"), "gone")
    with pytest.raises(DataError, match="2 pictures cannot be read"):
        tally.add(1, Unreadable("torn"), "gone")
