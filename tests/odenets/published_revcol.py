"""The published RevCol, written down plainly on its own keys: shapes, random weights, outputs."""

import torch
import torch.nn.functional as F

from odenets import checkpoints
from odenets.models import RevCol

SMALL = {"channels": (4, 8, 12, 16), "blocks": (1, 2, 1, 1), "num_classes": 5}


def block_shapes(prefix, c, hidden, kernel):
    return {
        f"{prefix}.gamma": (c,),
        f"{prefix}.dwconv.weight": (c, 1, kernel, kernel),
        f"{prefix}.dwconv.bias": (c,),
        f"{prefix}.norm.weight": (c,),
        f"{prefix}.norm.bias": (c,),
        f"{prefix}.pwconv1.weight": (hidden, c),
        f"{prefix}.pwconv1.bias": (hidden,),
        f"{prefix}.pwconv2.weight": (c, hidden),
        f"{prefix}.pwconv2.bias": (c,),
    }


def pair_shapes(prefix, weight):
    """A layer, then a norm of its width."""
    c = weight[0]
    return {
        f"{prefix}.0.weight": weight,
        f"{prefix}.0.bias": (c,),
        f"{prefix}.1.weight": (c,),
        f"{prefix}.1.bias": (c,),
    }


def public_shapes(channels, blocks, columns, kernel_size=3, num_classes=1000, supervision=False, huge=False):
    shapes = pair_shapes("stem", (channels[0], 3, 4, 4))
    for i in range(columns):
        for level, (c, count) in enumerate(zip(channels, blocks, strict=True)):
            at = f"subnet{i}.level{level}"
            shapes[f"subnet{i}.alpha{level}"] = (1, c, 1, 1)
            if level:
                shapes |= pair_shapes(f"{at}.fusion.down", (c, channels[level - 1], 2, 2))
            if i and level < 3:
                shapes |= pair_shapes(f"{at}.fusion.up.channel_reschedule", (c, channels[level + 1]))
            if i and huge and not level:
                shapes |= pair_shapes(f"{at}.fusion.up2.channel_reschedule", (c, channels[3]))
            for j in range(count):
                shapes |= block_shapes(f"{at}.blocks.{j}", c, 4 * c, kernel_size)
    c = channels[-1]
    for head in [f"cls_blocks.{k}" for k in range(4)] if supervision else ["cls"]:
        at = f"{head}.classifier"
        shapes |= {f"{at}.0.weight": (c,), f"{at}.0.bias": (c,)}
        shapes |= {f"{at}.1.weight": (num_classes, c), f"{at}.1.bias": (num_classes,)}
    for k in range(3) if supervision else ():
        at = f"decoder_blocks.{k}"
        if num_classes > 1000:
            shapes |= {f"{at}.projback.0.weight": (c,), f"{at}.projback.0.bias": (c,)}
            shapes |= {f"{at}.projback.1.weight": (3072, c, 1, 1), f"{at}.projback.1.bias": (3072,)}
            continue
        for s, (a, b) in enumerate([(channels[3 - s], channels[2 - s]) for s in range(3)]):
            shapes |= pair_shapes(f"{at}.proj_layers.{s}", (b, a, 1, 1))
            shapes |= block_shapes(f"{at}.normal_layers.{s}.0", b, b, 3)
        shapes |= {f"{at}.projback.0.weight": (48, channels[0], 1, 1), f"{at}.projback.0.bias": (48,)}
    return shapes


def random_weights(shapes, dtype=torch.float64):
    """Weights under which every part matters: norms and gammas about 1, alphas of both signs."""
    state = {}
    for key, shape in shapes.items():
        fan = max(1, torch.Size(shape[1:]).numel())
        value = torch.randn(shape, dtype=dtype) / fan**0.5
        if "alpha" in key:
            value = torch.randn(shape, dtype=dtype).sign() * (0.3 + 0.6 * torch.rand(shape, dtype=dtype))
        elif key.endswith("gamma") or (len(shape) == 1 and key.endswith("weight")):
            value = 0.5 + 0.2 * torch.randn(shape, dtype=dtype)
        state[key] = value
    return state


def norm_of_pixels(x, state, key):
    mean = x.mean(1, keepdim=True)
    var = (x - mean).square().mean(1, keepdim=True)
    c = x.shape[1]
    x = (x - mean) / torch.sqrt(var + 1e-6)
    return x * state[f"{key}.weight"].view(1, c, 1, 1) + state[f"{key}.bias"].view(1, c, 1, 1)


def pixelwise(x, state, key):
    weight = state[f"{key}.weight"]
    return F.conv2d(x, weight.view(*weight.shape[:2], 1, 1), state[f"{key}.bias"])


def public_block(x, state, key):
    w = state[f"{key}.dwconv.weight"]
    y = F.conv2d(x, w, state[f"{key}.dwconv.bias"], padding=w.shape[-1] // 2, groups=x.shape[1])
    y = pixelwise(norm_of_pixels(y, state, f"{key}.norm"), state, f"{key}.pwconv1")
    y = pixelwise(0.5 * y * (1 + torch.erf(y / 2**0.5)), state, f"{key}.pwconv2")
    return x + state[f"{key}.gamma"].view(1, -1, 1, 1) * y


def public_forward(state, x, columns, blocks):
    """The last level after every column, from the published keys: plain sums and products, no reversibility."""
    stem = norm_of_pixels(F.conv2d(x, state["stem.0.weight"], state["stem.0.bias"], stride=4), state, "stem.1")
    old, lasts = [None] * 4, []
    for i in range(columns):
        new = []
        for level in range(4):
            at = f"subnet{i}.level{level}"
            y = stem
            if level:
                w, b = state[f"{at}.fusion.down.0.weight"], state[f"{at}.fusion.down.0.bias"]
                y = norm_of_pixels(F.conv2d(new[-1], w, b, stride=2), state, f"{at}.fusion.down.1")
            for up, source, factor in (("up", level + 1, 2), ("up2", 3, 8)):
                key = f"{at}.fusion.{up}.channel_reschedule"
                if f"{key}.0.weight" in state:
                    z = norm_of_pixels(pixelwise(old[source], state, f"{key}.0"), state, f"{key}.1")
                    y = y + z.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
            for j in range(blocks[level]):
                y = public_block(y, state, f"{at}.blocks.{j}")
            alpha = state[f"subnet{i}.alpha{level}"]
            new.append(y + alpha * (torch.zeros_like(y) if old[level] is None else old[level]))
        old = new
        lasts.append(new[-1])
    return old, lasts


def public_head(c3, state, key):
    x = c3.mean((2, 3), keepdim=True)
    return pixelwise(norm_of_pixels(x, state, f"{key}.classifier.0"), state, f"{key}.classifier.1").flatten(1)


def public_decoder(x, state, key):
    if f"{key}.proj_layers.0.0.weight" not in state:
        y = norm_of_pixels(x, state, f"{key}.projback.0")
        return F.pixel_shuffle(pixelwise(y, state, f"{key}.projback.1"), 32)
    for s in range(3):
        y = norm_of_pixels(pixelwise(x, state, f"{key}.proj_layers.{s}.0"), state, f"{key}.proj_layers.{s}.1")
        y = F.interpolate(F.gelu(y), scale_factor=2, mode="bilinear", align_corners=True)
        x = public_block(y, state, f"{key}.normal_layers.{s}.0")
    return F.pixel_shuffle(pixelwise(x, state, f"{key}.projback.0"), 4)


def pair(columns=4, dtype=torch.float64, **kwargs):
    """A network and the published weights that it holds."""
    config = {**SMALL, "columns": columns, **kwargs}
    public = {k: v for k, v in config.items() if k != "backprop"}
    state = random_weights(public_shapes(**public), dtype)
    net = RevCol(**config).to(dtype)
    report = checkpoints.load(net, state)
    assert report.loaded == len(state) and report.layout == "published RevCol" and not report.dropped
    return net, state


def close(a, b, bound):
    """Relative difference in the Euclidean norm."""
    return bool((a - b).norm() <= bound * b.norm())
