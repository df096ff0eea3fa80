"""Inference on whole pictures: in one piece or by sliding windows, at several scales, and mirrored."""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from schemes import SchemeError

from .nets import SegmentationNet


class Inference:
    """Averages the scores of several views of a picture.

    With several views the mean is taken over the network's ``probabilities``, at the requested size.

    Args:
        window: side, or height and width, of a window that slides over pictures larger than it; None takes the whole
            picture. Where windows overlap, their scores are averaged.
        stride: step of the window; None is two thirds of the window.
        scales: sizes of the views, relative to the given picture.
        flip: whether each view is also evaluated mirrored.

    Raises:
        SchemeError: a window, stride or scale is invalid, or the strides leave gaps.

    Example:
        >>> import torch
        >>> from odenets.segmentation import UPerNet
        >>> net = UPerNet("resnet20", num_classes=5, width=16, auxiliary_width=16).eval()
        >>> Inference(window=32, scales=(0.5, 1), flip=True)(net, torch.randn(1, 3, 40, 48), (80, 96)).shape
        torch.Size([1, 5, 80, 96])
    """

    def __init__(
        self,
        window: int | list[int] | None = None,
        stride: int | list[int] | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
    ) -> None:
        self.window = None if window is None else _pair(window, "window")
        if stride is None:
            self.stride = self.window and (-(-self.window[0] * 2 // 3), -(-self.window[1] * 2 // 3))
        else:
            self.stride = _pair(stride, "stride")
        if self.stride and not self.window:
            raise SchemeError(f"Inference: stride={stride} and no window\n  Give the window, too")
        if self.window and any(s > w for s, w in zip(self.stride or (), self.window, strict=True)):
            raise SchemeError(f"Inference: windows of {self.window} that move by {self.stride} leave gaps")
        if not scales or not all(0 < scale < math.inf for scale in scales):
            raise SchemeError(f"Inference: scales={list(scales)}; wants one or more, above 0")
        self.scales, self.flip = tuple(scales), flip

    @torch.no_grad()
    def __call__(self, net: SegmentationNet, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Returns the scores of one view, or the mean probabilities of several: (n, classes, *size).

        Args:
            net: the network.
            x: pictures of one size, (n, c, h, w), normalised.
            size: height and width of the result.
        """
        views = len(self.scales) * (1 + self.flip)
        total: Tensor | None = None
        for view, mirrored in self._views(x):
            scores = self._windowed(net, view)
            scores = scores.flip(-1) if mirrored else scores
            # Resized and summed in single precision, since half precision would round once per view.
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
            if scores.shape[-2:] != size:
                scores = F.interpolate(scores, size, mode="bilinear", align_corners=False)
            # The highest score has the highest probability, so a single view needs no softmax.
            if views == 1:
                return scores
            found = net.probabilities(scores) / views
            total = found if total is None else total.add_(found)
        assert total is not None
        return total

    def _views(self, x: Tensor) -> Iterator[tuple[Tensor, bool]]:
        for scale in self.scales:
            view = x
            if scale != 1:
                resized = [max(1, round(side * scale)) for side in x.shape[-2:]]
                # Antialiased, as Pillow does when pictures are decoded: otherwise fine texture aliases.
                view = F.interpolate(x, resized, mode="bilinear", align_corners=False, antialias=True)
            yield view, False
            if self.flip:
                yield view.flip(-1), True

    def _windowed(self, net: SegmentationNet, x: Tensor) -> Tensor:
        """Returns scores at the size of x, averaged over the windows that cover each pixel."""
        if self.window is None or all(a <= b for a, b in zip(x.shape[-2:], self.window, strict=True)):
            return net(x)
        assert self.stride is not None
        tops, lefts = (
            starts(side, window, stride)
            for side, window, stride in zip(x.shape[-2:], self.window, self.stride, strict=True)
        )
        height, width = self.window
        total, count = None, x.new_zeros(x.shape[-2:], dtype=torch.float32)
        for top in tops:
            for left in lefts:
                place = slice(top, top + height), slice(left, left + width)
                scores = net(x[(..., *place)])
                # The number of classes and the dtype are known only now.
                if total is None:
                    kind = torch.promote_types(scores.dtype, torch.float32)
                    total = scores.new_zeros((*scores.shape[:2], *x.shape[-2:]), dtype=kind)
                total[(..., *place)] += scores
                count[place] += 1
        assert total is not None
        # Never 0, since strides that leave gaps are rejected.
        return total / count


def starts(side: int, window: int, stride: int) -> list[int]:
    """Returns the start of each window along a side: every `stride`, and the last one flush with the end.

    Example:
        >>> starts(100, 40, 30), starts(30, 40, 30)
        ([0, 30, 60], [0])
        >>> starts(105, 40, 30)
        [0, 30, 60, 65]
    """
    # The last window is moved back to the end of the picture, so that none needs padding.
    last = max(0, side - window)
    return [*range(0, last, stride), last]


def _pair(given: int | list[int], name: str) -> tuple[int, int]:
    """Returns height and width, checked."""
    pair = (given, given) if isinstance(given, int) else tuple(given)
    if len(pair) != 2 or min(pair) < 1:
        raise SchemeError(f"Inference: {name}={given}; wants pixels, or height and width")
    return pair[0], pair[1]
