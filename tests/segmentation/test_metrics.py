"""Figures over a whole set equal those that are counted by hand, pixel by pixel."""

import math

import pytest
import torch

from odenets.segmentation import Overlap
from schemes import SchemeError


def by_hand(pairs, classes):
    """mIoU, mAcc, aAcc by counting sets of pixels."""
    seen = [
        (i, a, b)
        for i, (said, y) in enumerate(pairs)
        for a, b in zip(said.flatten().tolist(), y.flatten().tolist(), strict=True)
    ]
    seen = [(n, a, b) for n, (_, a, b) in enumerate(seen) if b != -100]
    ious, accs = [], []
    for c in range(classes):
        said, true = ({n for n, *pair in seen if pair[k] == c} for k in (0, 1))
        if said | true:
            ious.append(len(said & true) / len(said | true))
        if true:
            accs.append(len(said & true) / len(true))
    return sum(ious) / len(ious), sum(accs) / len(accs), sum(a == b for _, a, b in seen) / len(seen)


def figures(overlap):
    found = overlap.compute()
    return [float(found[name]) for name in ("mIoU", "mAcc", "aAcc")]


def test_a_table_of_eight_pixels():
    overlap = Overlap(4)
    #                              right     wrong: 1 for 0, 2 for 1       does not count
    overlap.update(torch.tensor([[0, 0, 1, 1], [1, 2, 3, 1]]), torch.tensor([[0, 0, 1, 0], [1, 1, -100, 1]]))
    # IoU: 0 is 2/3; 1 is 3/5 (said 1 four times, true four times, both three); 2 is 0/1; 3 is nowhere and left out.
    assert figures(overlap) == pytest.approx([(2 / 3 + 3 / 5 + 0) / 3, (2 / 3 + 3 / 4) / 2, 5 / 7])
    each = overlap.compute()["IoU"]
    assert each[:3].tolist() == pytest.approx([2 / 3, 3 / 5, 0]) and math.isnan(each[3])


@pytest.mark.parametrize("seed", range(3))
def test_batches_add_up_to_the_whole_set(seed):
    random = torch.Generator().manual_seed(seed)
    pairs = []
    for size in ((4, 5), (3, 3), (1, 7)):  # class 5 is in no mask, class 6 is nowhere
        said, y = (torch.randint(0, top, size, generator=random) for top in (6, 5))
        y[torch.rand(size, generator=random) < 0.2] = -100
        pairs.append((said, y))
    overlap = Overlap(7)
    for pair in pairs:
        overlap.update(*pair)
    assert figures(overlap) == pytest.approx(by_hand(pairs, 7))
    overlap.reset()
    overlap.update(*pairs[0])
    assert figures(overlap) == pytest.approx(by_hand(pairs[:1], 7))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_masks_of_any_type_are_counted_alike(kind):
    """In 8 bits without a sign -100 would be 156."""
    one, two = Overlap(200), Overlap(200)
    for said, y in (([3, 156], [3, 8]), ([199, 7], [156, 156])):
        one.update(torch.tensor(said).to(kind), torch.tensor(y).to(kind))
        two.update(torch.tensor(said), torch.tensor(y))
    assert torch.equal(one.counts, two.counts) and int(one.counts.sum()) == 4


@pytest.mark.parametrize(
    ("said", "y", "message"),
    [
        ([[0, 1, 2]], [[0], [1], [2]], r"predictions \(1, 3\) and masks \(3, 1\)"),
        ([0, 1, 2], [0, 1], r"predictions \(3,\) and masks \(2,\)"),
        ([0, 3], [0, 0], "classes of 0 to 3; wants 0 to 2"),
        ([0, 1], [0, 255], "classes of 0 to 255; wants 0 to 2"),
        ([0, 1], [0, -1], "classes of -1 to 1"),
        ([-100, 1], [0, 1], "classes of -100 to 1"),
    ],
)
def test_what_would_be_counted_in_other_cells_is_refused(said, y, message):
    overlap = Overlap(3)
    with pytest.raises(SchemeError, match=message) as stop:
        overlap.update(torch.tensor(said), torch.tensor(y))
    assert len(str(stop.value).splitlines()) == 2 and int(overlap.counts.sum()) == 0
    overlap.update(torch.tensor([0, 7]), torch.tensor([0, -100]))  # a pixel that does not count may be anything
    assert int(overlap.counts.sum()) == 1


def test_no_pixel_is_no_figure():
    overlap = Overlap(3)
    overlap.update(torch.zeros(2, 2), torch.full((2, 2), -100))
    assert all(math.isnan(figure) for figure in figures(overlap))
