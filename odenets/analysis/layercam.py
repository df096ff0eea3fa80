"""LayerCAM: which pixels a class rests on, at any layer of a network."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemes import SchemeError

from ..stack import keeping_all
from .features import Features


def layer_cam(model: nn.Module, x: Tensor, names: Sequence[str], target: Tensor | int | None = None) -> list[Tensor]:
    """Heat maps: relu(sum over channels of relu(d score / d feature) * feature), from 0 to 1, as large as the picture.

    Args:
        model: any network that classifies pictures; runs in evaluation mode, and is left as it was.
        x: (n, c, h, w).
        names: places, see ``Features``; maps (n, c', h', w') or tokens (n, t, c'), where one token beyond a grid of
            patches is taken to be a class token in front.
        target: the class whose score is looked at, for all pictures or one each; the best one where left out.

    Returns:
        One tensor (n, h, w) per place.

    Raises:
        SchemeError: a place that gives no map, or that the score does not depend on.

    Source:
        Jiang et al. 2021, LayerCAM: Exploring Hierarchical Class Activation Maps for Localization, IEEE TIP 30,
        5875-5888, equations 5 to 7.

    Example:
        >>> import torch
        >>> from odenets import create_model
        >>> net = create_model("ho_resnet26", num_classes=3)
        >>> [heat] = layer_cam(net, torch.randn(2, 3, 32, 32), ["levels.1"])
        >>> heat.shape, bool((heat >= 0).all() and (heat <= 1).all())
        (torch.Size([2, 32, 32]), True)
    """
    training = model.training
    model.eval()
    try:
        # The input asks for a gradient, so that features have a graph even in a frozen network.
        with torch.enable_grad(), keeping_all(model), Features(model, names) as features:
            logits = model(x.detach().requires_grad_())
            if target is None:
                target = logits.argmax(1)
            chosen = torch.as_tensor(target, device=logits.device).expand(len(x))
            score = logits.gather(1, chosen[:, None]).sum()
            maps = [features[name] for name in names]
            grads = torch.autograd.grad(score, maps, allow_unused=True)
    finally:
        model.train(training)
    found = []
    for name, a, g in zip(names, maps, grads, strict=True):
        if g is None:
            raise SchemeError(f"layer_cam: the score does not depend on {name}; choose a place before the head.")
        heat = _as_map(g.relu() * a, name, x).sum(1).relu().detach()
        heat = heat / heat.flatten(1).amax(1).clamp_min(1e-30)[:, None, None]
        heat = F.interpolate(heat[:, None], x.shape[-2:], mode="bilinear", align_corners=False)
        found.append(heat[:, 0])
    return found


def _as_map(y: Tensor, name: str, x: Tensor) -> Tensor:
    """A map (n, c, h, w), from one or from tokens of a picture x."""
    if y.dim() == 4:
        return y
    if y.dim() == 3:
        height, width = x.shape[-2:]
        for first in (0, 1):
            count = y.shape[1] - first
            # The grid has the picture's proportions.
            rows = round((count * height / width) ** 0.5)
            if rows and count % rows == 0 and abs(count / rows / rows - width / height) < 1e-6:
                return y[:, first:].transpose(1, 2).unflatten(2, (rows, -1))
    raise SchemeError(f"layer_cam: {name} gives {tuple(y.shape)}, neither a map nor the tokens of a picture.")
