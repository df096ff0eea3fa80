"""Views of a picture, windows and sizes, against what is computed by hand."""

import pytest
import torch
import torch.nn.functional as F

from odenets.segmentation import Inference
from odenets.segmentation.inference import starts
from schemes import SchemeError

from .scenes import PerPixel, revcol

X = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def net():
    return revcol(auxiliary=0).eval()


def test_one_whole_view_is_the_network(net):
    with torch.no_grad():
        assert torch.equal(Inference()(net, X, (12, 20)), net(X))
        # A window as large as the picture covers it once.
        assert torch.equal(Inference(window=[12, 20])(net, X, (12, 20)), net(X))
        assert torch.equal(Inference(window=32)(net, X, (12, 20)), net(X))


def test_windows_that_cover_each_pixel_once_are_put_side_by_side(net):
    found = Inference(window=[6, 10], stride=[6, 10])(net, X, (12, 20))
    with torch.no_grad():
        rows = [torch.cat([net(X[..., t : t + 6, s : s + 10]) for s in (0, 10)], 3) for t in (0, 6)]
    assert torch.equal(found, torch.cat(rows, 2))


def test_where_windows_overlap_the_mean_counts(net):
    found = Inference(window=[12, 10], stride=[12, 6])(net, X, (12, 20))
    total, count = torch.zeros(2, 5, 12, 20), torch.zeros(20)
    with torch.no_grad():
        for left in (0, 6, 10):  # the last one ends where the picture ends
            total[..., left : left + 10] += net(X[..., left : left + 10])
            count[left : left + 10] += 1
    assert count.max() == 2
    torch.testing.assert_close(found, total / count)


def test_windows_of_what_depends_on_the_pixel_alone_are_the_whole():
    net = PerPixel()
    torch.testing.assert_close(Inference(window=7, stride=3)(net, X, (12, 20)), net(X))


def test_sizes_and_mirror_images_are_averaged_as_probabilities(net):
    found = Inference(scales=(0.5, 1.5), flip=True)(net, X, (24, 40))
    views = []
    with torch.no_grad():
        for height, width in ((6, 10), (18, 30)):
            small = F.interpolate(X, (height, width), mode="bilinear", align_corners=False, antialias=True)
            for scores in (net(small), net(small.flip(3)).flip(3)):
                views.append(F.interpolate(scores, (24, 40), mode="bilinear", align_corners=False).softmax(1))
    assert len(views) == 4
    torch.testing.assert_close(found, sum(views) / 4)
    assert torch.allclose(found.sum(1), torch.ones(2, 24, 40))


def test_a_mirrored_picture_gives_the_mirrored_mean(net):
    views = Inference(flip=True)
    torch.testing.assert_close(views(net, X.flip(3), (12, 20)), views(net, X, (12, 20)).flip(3))


@pytest.mark.parametrize(
    ("side", "window", "stride"), [(5, 7, 2), (7, 7, 2), (20, 7, 7), (20, 7, 3), (21, 7, 7), (8, 7, 7)]
)
def test_windows_cover_a_side_and_end_with_it(side, window, stride):
    found = starts(side, window, stride)
    assert {i for s in found for i in range(s, min(side, s + window))} == set(range(side))
    assert found[0] == 0 and found[-1] == max(0, side - window) and len(set(found)) == len(found)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 0},
        {"window": 8, "stride": 9},
        {"stride": 4},
        {"scales": []},
        {"scales": [0]},
        {"scales": (1, float("nan"))},
        {"scales": (1, float("inf"))},
        {"window": [8]},
    ],
)
def test_refuses(options):
    with pytest.raises(SchemeError, match="Inference"):
        Inference(**options)
