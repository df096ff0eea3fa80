"""What the values and colours of stored masks mean, and what is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from odenets.segmentation.masks import Labels, colors
from odenets.training.decode import Unreadable
from odenets.training.errors import DataError

SIZE = (3, 2)
BLACK_AND_RED = [[0, 0, 0], [255, 0, 0]]


def stored(levels, mode=None, palette=None) -> bytes:
    image = Image.fromarray(np.asarray(levels))
    if mode == "P":
        image.putpalette(palette)
    elif mode:
        image = image.convert(mode)
    image.save(out := io.BytesIO(), "TIFF" if image.mode == "I" else "PNG")
    return out.getvalue()


GREY = np.array([[0, 1, 2], [255, 1, 0]], dtype=np.uint8)
WANT = [[0, 1, 2], [-100, 1, 0]]


@pytest.mark.parametrize(
    "mask",
    [
        stored(GREY),
        stored(GREY, "RGB"),
        stored(GREY, "RGBA"),
        stored(GREY.astype(np.uint16)),
        stored(GREY.astype(np.int32)),
        stored(GREY, "P", [200, 7, 7, 0, 0, 9, 1, 2, 3] + [5] * 759),  # numbers, whatever colours they have
    ],
    ids=["L", "RGB", "RGBA", "I;16", "I", "P"],
)
def test_numbers_are_read_from_every_kind_of_picture(mask):
    assert Labels(3).read(mask, SIZE).tolist() == WANT


def deep(levels: np.ndarray) -> bytes:
    """A PNG in colour of 16 bits a channel, which Pillow reads and cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + np.repeat(row[:, None], 3, 1).astype(">u2").tobytes() for row in levels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("turn", [1, 3, 6])
def test_a_mask_is_turned_as_it_says_itself(turn):
    levels = {1: GREY, 3: GREY[::-1, ::-1], 6: np.rot90(GREY)}[turn]
    exif = Image.Exif()
    exif[274] = turn
    Image.fromarray(np.ascontiguousarray(levels)).save(out := io.BytesIO(), "PNG", exif=exif)
    assert Labels(3).read(out.getvalue(), SIZE).tolist() == WANT


def test_more_than_256_classes():
    assert Labels(1000).read(stored(np.array([[999, 300, 255]], dtype=np.uint16)), (3, 1)).tolist() == [[999, 300, 255]]


def test_reduction_shifts_and_leaves_0_out():
    assert Labels(150, reduce=True).read(
        stored(np.array([[0, 1, 150], [255, 2, 3]], dtype=np.uint8)), SIZE
    ).tolist() == [
        [-100, 0, 149],
        [-100, 1, 2],
    ]


def test_ids_leave_all_others_out():
    labels = Labels(2, ids=[7, 3])
    assert labels.read(stored(np.array([[7, 3, 9], [0, 255, 7]], dtype=np.uint8)), SIZE).tolist() == [
        [0, 1, -100],
        [-100, -100, 0],
    ]


def test_colours_by_a_palette():
    palette = [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    levels = np.array([*palette, [224, 224, 192], palette[1], palette[0]], dtype=np.uint8).reshape(2, 3, 3)
    assert Labels(3, palette=palette, ignore_colors=[[224, 224, 192]]).read(stored(levels), SIZE).tolist() == WANT
    with pytest.raises(Unreadable, match=r"colour \(224, 224, 192\)"):
        Labels(3, palette=palette).read(stored(levels), SIZE)


@pytest.mark.parametrize(
    ("mask", "options", "says"),
    [
        (stored(GREY), {"count": 2}, "holds 2; classes are 0 to 1, beside 255"),
        (stored(GREY), {"count": 3, "ignore": [7]}, "holds 255; classes are 0 to 2, beside 7"),
        (stored(GREY[:1]), {"count": 3}, "its mask is 3x1, and the picture 3x2"),
        (stored(GREY)[:40], {"count": 3}, "its mask: "),
        (b"", {"count": 3}, "its mask: it is empty"),
        (stored(np.arange(18, dtype=np.uint8).reshape(2, 3, 3)), {"count": 3}, "no data.palette"),
        (stored(np.stack([GREY] * 4, 2)), {"count": 3}, "its mask has transparent pixels"),
        (stored(np.stack([GREY] * 4, 2)), {"count": 2, "palette": [[0] * 3, [1] * 3]}, "has transparent pixels"),
        (stored(GREY.astype(np.uint16)), {"count": 2, "palette": [[0] * 3, [1] * 3]}, "which stores no colours"),
        (deep(GREY), {"count": 3}, "in colour of 16 bits a channel"),
        (stored(np.array([[-100, 0, 1]] * 2, dtype=np.int32), "I"), {"count": 2}, "holds -100; classes are 0 to 1"),
    ],
)
def test_what_is_no_mask_of_the_picture_is_named(mask, options, says):
    with pytest.raises(Unreadable, match=says):
        Labels(**options).read(mask, SIZE)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"count": 1}, "data.classes: 1 classes"),
        ({"count": 3, "ids": [1, 2]}, "data.ids has 2 entries for 3"),
        ({"count": 2, "ids": [4, 4]}, "two classes have one value"),
        ({"count": 2, "ids": [4, 5], "reduce": True}, "both say"),
        ({"count": 3, "ignore": [2]}, "2 is the value of a class"),
        ({"count": 2, "palette": [[0, 0, 0], [0, 0, 256]]}, "is no colour"),
        ({"count": 2, "palette": [[0, 0, 0], [0, 0, 0]]}, "two classes have one colour"),
        ({"count": 2, "palette": BLACK_AND_RED, "ids": [4, 5]}, "data.ids for masks of numbers"),
        ({"count": 2, "palette": BLACK_AND_RED, "ignore": [7]}, "data.ignore for masks of numbers"),
        ({"count": 2, "palette": BLACK_AND_RED, "reduce": True}, "data.reduce_labels for masks of numbers"),
        (
            {"count": 2, "palette": BLACK_AND_RED, "ignore_colors": [[1, 2, 3], [255, 0, 0]]},
            r"\(255, 0, 0\) is the col",
        ),
        ({"count": 2, "ignore_colors": [[1, 2, 3]]}, "in colour only with data.palette"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, says):
    with pytest.raises(DataError, match=says + r".*\n  "):
        Labels(**options)


def test_colours_differ_and_are_those_of_voc():
    assert len({tuple(color) for color in colors(256)}) == 256
    assert colors(21)[1] == [128, 0, 0] and colors(21)[20] == [0, 64, 128] and colors(21)[15] == [192, 128, 128]
