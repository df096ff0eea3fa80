"""The random network of a study: a stem, one stack of residual functions of one kind, pooling, a head."""

from typing import Any

from torch import Tensor, nn

from schemes import Slot

from ..layers import DropPath, LayerNorm2d, init_kaiming, linear_rates
from ..models.dense_levels import width_after
from ..models.level_net import LevelNet
from ..models.levels import steps_that_fit
from ..stack import Stack
from .space import Candidate, scheme_of

_ACTIVATIONS: dict[str, Any] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
}
_NORMS: dict[str, Any] = {"batch": nn.BatchNorm2d, "layer": LayerNorm2d}


class RandomFunction(nn.Sequential):
    """A bottleneck 1x1 - k x k - 1x1 with norm and activation before or after each convolution.

    ``pre``: three times norm-act-conv; ``post``: conv-norm-act-conv-norm-act-conv-norm; ``post_linear`` is the same,
    but the network treats the result differently (``RandomNet``).

    Args:
        in_channels: width of the input.
        candidate: the network; supplies all other settings.
        last_act: whether to end in an activation, for results that are appended rather than added.
        drop_path: probability that a sample's result is zeroed in training.

    Shape:
        x: (n, in_channels, h, w); the result is (n, candidate.width, h, w).
    """

    def __init__(self, in_channels: int, candidate: Candidate, last_act: bool = False, drop_path: float = 0.0):
        act, norm = _ACTIVATIONS[candidate.activation], _NORMS[candidate.norm]
        widths, kernels = (in_channels, candidate.middle, candidate.middle, candidate.width), (1, candidate.kernel, 1)
        layers: list[nn.Module] = []
        # Not strict: `widths` is longer by one.
        for i, (before, after, k) in enumerate(zip(widths, widths[1:], kernels, strict=False)):
            conv = nn.Conv2d(before, after, k, padding=k // 2, bias=False)
            if candidate.order == "pre":
                layers += [norm(before), act(), conv]
            else:
                # Where results are added, an activation at the end would make every change of the stream positive.
                layers += [conv, norm(after), *([act()] if i < 2 or last_act else [])]
        super().__init__(*layers, *([DropPath(drop_path)] if drop_path else []))


class RandomNet(LevelNet):
    """Conv3x3 of stride 2 - a ``Stack`` of ``RandomFunction`` - mean - linear, as a ``Candidate`` specifies.

    The first level of a ResNet alone, as in the pilot study of the RDNet paper. Under ``euler`` the results are added
    to a stream of ``width`` channels; under ``dense`` they are appended, ``width`` at a time. With order "post", an
    activation follows the sum, or ends each appended result; with "pre", norm and activation precede the pooling.

    Args:
        candidate: the network.
        num_classes: width of the head.

    Shapes:
        x: (n, 3, h, w); the result is (n, num_classes).

    Raises:
        SchemeError: a depth that the scheme's stages do not divide.

    Source:
        Kim et al. 2024, DenseNets Reloaded, arXiv 2403.19588, section 5.1. The paper leaves the stem and the form of a
        block open; under this reading, its bounds in millions of parameters and in billions of multiply-adds hold for
        the same networks.

    Example:
        >>> import torch
        >>> from odenets.study import SPACES, sample
        >>> add, concat = sample(SPACES["mini"], ("euler", "dense"), 1, size=32, classes=10)[:2]
        >>> RandomNet(concat, 10)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, candidate: Candidate, num_classes: int):
        super().__init__(num_classes=num_classes)
        c = candidate
        appended = c.scheme == "dense"
        scheme = scheme_of(c.scheme, c.width)
        act, norm = _ACTIVATIONS[c.activation], _NORMS[c.norm]
        pre, post = c.order == "pre", c.order == "post"
        self.stem = nn.Sequential(nn.Conv2d(3, c.width, 3, 2, 1, bias=False))
        # Pre-activated functions begin with the norm that the stem would have.
        if not pre:
            self.stem.extend([norm(c.width), act()])
        rates = iter(linear_rates(c.strength if c.augment == "drop_path" else 0.0, c.depth))

        def make(slot: Slot) -> nn.Module:
            return RandomFunction(sum(slot.in_channels), c, last_act=post and appended, drop_path=next(rates))

        after = act() if post and not appended else None
        steps = steps_that_fit(scheme, c.depth, 1)
        self.transitions.append(nn.Identity())
        self.levels.append(Stack.from_factory(make, scheme, steps, channels=c.width, post_step=after))
        # Under "dense" every function widens the stream.
        last = width_after(scheme, c.width, steps)
        if pre:
            self.norm = nn.Sequential(norm(last), act())
        init_kaiming(self)
        self.finish_levels([last], [2])

    def trajectory(self, x: Tensor) -> list[Tensor]:
        """Returns the stem's result, and the stream after every step (joined, where streams are appended).

        Args:
            x: (n, c, h, w).
        """
        x = self.stem(x)
        stack = self.levels[0]
        assert isinstance(stack, Stack)
        return [x, *stack.trajectory(x)]
