"""LayerCAM: the pixels that a class depends on, at any layer of a network."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from schemes import SchemeError

from ..stack import keeping_all
from .features import READOUT, Features, evaluating


def layer_cam(model: nn.Module, x: Tensor, names: Sequence[str], target: Tensor | int | None = None) -> list[Tensor]:
    """Heat maps: relu(sum over channels of relu(d score / d feature) * feature), from 0 to 1, as large as the picture.

    Args:
        model: any network that classifies pictures; runs in evaluation mode, and is left as it was.
        x: (n, c, h, w).
        names: places, see ``Features``; maps (n, c', h', w') or tokens (n, t, c'), where one token beyond a grid of
            patches is taken for a leading class token. ``name:readout`` is the map of all of a step's streams: the sum
            runs over the channels of each, since the network continues with them and not with their readout. For
            streams that are joined (DenseNet, RevNet), this is the map of the joined tensor.
        target: the class whose score is explained, for all pictures or one each; the best one if left out.

    Returns:
        One tensor (n, h, w) per place, at least in single precision; 0 where no value is positive.

    Raises:
        SchemeError: a place that has no map, or that the score does not depend on; a target that is not a class; values
            that are not finite.

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
    if not x.is_floating_point():
        raise SchemeError(f"layer_cam: pictures of {x.dtype} have no gradient.\n  Give what the network is trained on.")
    if torch.is_inference_mode_enabled() or x.is_inference():
        raise SchemeError(
            "layer_cam: in torch.inference_mode nothing has a gradient.\n  Call it outside, with x.clone()."
        )
    # The input requires a gradient, so that features have a graph even in a frozen network. The network gets a copy
    # that is not a leaf, so that it may write into it.
    given = x.detach().requires_grad_()
    with evaluating(model), torch.enable_grad(), keeping_all(model), Features(model, names) as features:
        logits = model(given.clone())
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
            raise SchemeError(
                "layer_cam: the network gives no scores (n, classes).\n  Give one that classifies, with its head."
            )
        score = logits.gather(1, _chosen(target, logits)[:, None]).sum()
        places = [features.parts(name) for name in names]
    grads = iter(_gradients(score, [edge for parts in places for _, edge in parts]))
    found = []
    for name, parts in zip(names, places, strict=True):
        values = [(value.detach(), next(grads)) for value, _ in parts]
        # A stream that nothing reads any more contributes nothing.
        used = [(a, g) for a, g in values if g is not None]
        if not used:
            raise SchemeError(f"layer_cam: the score does not depend on {name}; choose a place before the head.")
        if len({a.shape[2:] if a.dim() == 4 else a.shape[1:2] for a, _ in used}) > 1:
            sizes = ", ".join(str(tuple(a.shape)) for a, _ in used)
            raise SchemeError(
                f"layer_cam: the streams of {name} are of several sizes: {sizes}.\n"
                f"  Choose one of them, {name.removesuffix(READOUT)}0."
            )
        a, g = (torch.cat([_as_map(pair[i], name, x) for pair in used], 1) for i in (0, 1))
        heat = _heat(a, g)
        if not heat.isfinite().all():
            raise SchemeError(f"layer_cam: {name} or its gradient is not finite.\n  Try model.float() and x.float().")
        heat = F.interpolate(heat[:, None], x.shape[-2:], mode="bilinear", align_corners=False)
        found.append(heat[:, 0])
    return found


def _chosen(target: Tensor | int | None, logits: Tensor) -> Tensor:
    """The class of each picture."""
    n, classes = logits.shape
    if target is None:
        return logits.argmax(1)
    chosen = torch.as_tensor(target, device=logits.device)
    if chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool or chosen.numel() not in (1, n):
        raise SchemeError(
            f"layer_cam: target {tuple(chosen.shape)} of {chosen.dtype} for {n} pictures; want one class, or one each."
        )
    chosen = chosen.reshape(-1).long().expand(n)
    wrong = chosen[(chosen < 0) | (chosen >= classes)]
    if len(wrong):
        raise SchemeError(
            f"layer_cam: target {int(wrong[0])} is no class of 0 to {classes - 1}.\n"
            "  Leave out pictures without a label, or leave out target: then the best class is looked at."
        )
    return chosen


def _gradients(score: Tensor, edges: Sequence[GradientEdge | None]) -> list[Tensor | None]:
    """Gradients of the score, up to a factor that cancels in heat maps; None if it does not depend on the place."""
    wanted = [edge for edge in edges if edge is not None]
    if not wanted or not score.requires_grad:
        return [None] * len(edges)
    # In half precision the gradients of a mean over a map are near the smallest numbers, so they are scaled by the
    # largest of these powers of two that leaves all of them finite. Elsewhere such a factor changes no digit.
    grads: Sequence[Tensor | None] = ()
    for scale in (2.0**15, 2.0**10, 2.0**5, 1.0):
        factor = torch.full_like(score, scale)
        grads = torch.autograd.grad(score, wanted, factor, allow_unused=True, retain_graph=True)
        if all(g is None or bool(g.isfinite().all()) for g in grads):
            break
    left = iter(grads)
    return [None if edge is None else next(left) for edge in edges]


def _heat(a: Tensor, g: Tensor) -> Tensor:
    """relu(sum over channels of relu(g) a) over its maximum, (n, h, w); 0 where nothing is positive.

    At least in single precision, and with both factors scaled to at most 1, so that no product under- or overflows.
    """
    parts = []
    for y in (a, g.relu()):
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        parts.append(y / _or_one(y.abs().flatten(1).amax(1))[:, None, None, None])
    heat = (parts[0] * parts[1]).sum(1).relu()
    return heat / _or_one(heat.flatten(1).amax(1))[:, None, None]


def _or_one(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.ones_like(x))


def _as_map(y: Tensor, name: str, x: Tensor) -> Tensor:
    """Returns a map (n, c, h, w), from a map or from the tokens of a picture x."""
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
