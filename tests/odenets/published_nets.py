"""Published networks, written out plainly under their published names: what loaded weights are compared with."""

import torch
import torch.nn.functional as F
from torch import nn


def fill(model: nn.Module) -> nn.Module:
    """Random weights and statistics that keep the numbers in range; every tensor differs from its default."""
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith("num_batches_tracked"):
                value.fill_(7)
            elif key.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.ndim > 1 and value[0].numel() > 1:
                value.normal_(std=(1 / value[0].numel()) ** 0.5)
            elif key.endswith(("gamma", "layer_scale")):
                value.uniform_(0.3, 1.0)
            else:
                value.normal_(1.0 if key.endswith("weight") else 0.0, 0.2)
    return model.eval()


def channel_norm(x, weight, bias, eps=1e-6):
    """LayerNorm over dimension 1, as written in the paper."""
    mean = x.mean(1, keepdim=True)
    var = (x - mean).square().mean(1, keepdim=True)
    shape = (1, -1, *(1,) * (x.ndim - 2))
    return (x - mean) / torch.sqrt(var + eps) * weight.view(shape) + bias.view(shape)


class Affine(nn.Module):
    """Weight and bias of a LayerNorm over dimension 1."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), eps

    def forward(self, x):
        return channel_norm(x, self.weight, self.bias, self.eps)


class Named(nn.Module):
    """Modules by dotted names, so that a state dict has any layout; called through ``of``."""

    def __init__(self):
        super().__init__()
        self.parts: dict[str, nn.Module] = {}

    def put(self, path, module):
        *folders, last = path.split(".")
        place: nn.Module = self
        for folder in folders:
            if folder not in place._modules:
                place.add_module(folder, nn.Module())
            place = place._modules[folder]
        place.add_module(last, module)
        self.parts[path] = module

    def scale(self, path, shape):
        folder, _, last = path.rpartition(".")
        place = self
        for name in folder.split("."):
            if name not in place._modules:
                place.add_module(name, nn.Module())
            place = place._modules[name]
        place.register_parameter(last, nn.Parameter(torch.ones(shape)))
        self.parts[path] = place

    def of(self, path, x):
        return self.parts[path](x)


CONVNEXT_LAYOUTS = {
    "facebookresearch": {
        "stem": ("downsample_layers.0.0", "downsample_layers.0.1"),
        "down": ("downsample_layers.{l}.0", "downsample_layers.{l}.1"),
        "block": "stages.{l}.{b}",
        "parts": ("dwconv", "norm", "pwconv1", "pwconv2", "gamma"),
        "head": ("norm", "head"),
    },
    "timm": {
        "stem": ("stem.0", "stem.1"),
        "down": ("stages.{l}.downsample.0", "stages.{l}.downsample.1"),
        "block": "stages.{l}.blocks.{b}",
        "parts": ("conv_dw", "norm", "mlp.fc1", "mlp.fc2", "gamma"),
        "head": ("head.norm", "head.fc"),
    },
    "torchvision": {
        "stem": ("features.0.0", "features.0.1"),
        "down": ("features.{k}.0", "features.{k}.1"),
        "block": "features.{o}.{b}",
        "parts": ("block.0", "block.2", "block.3", "block.5", "layer_scale"),
        "head": ("classifier.0", "classifier.2"),
    },
}


class ConvNeXt(Named):
    """ConvNeXt under one of three published layouts."""

    def __init__(self, layout, depths, widths, classes):
        super().__init__()
        self.layout, self.depths, self.names = layout, depths, CONVNEXT_LAYOUTS[layout]
        n = self.names
        self.put(n["stem"][0], nn.Conv2d(3, widths[0], 4, 4))
        self.put(n["stem"][1], Affine(widths[0]))
        for level, (depth, c) in enumerate(zip(depths, widths, strict=True)):
            if level:
                norm, conv = (self.at(p, level) for p in n["down"])
                self.put(norm, Affine(widths[level - 1]))
                self.put(conv, nn.Conv2d(widths[level - 1], c, 2, 2))
            for b in range(depth):
                dw, norm, fc1, fc2, gamma = (f"{self.at(n['block'], level, b)}.{p}" for p in n["parts"])
                self.put(dw, nn.Conv2d(c, c, 7, padding=3, groups=c))
                self.put(norm, Affine(c))
                self.put(fc1, nn.Linear(c, 4 * c))
                self.put(fc2, nn.Linear(4 * c, c))
                self.scale(gamma, (c, 1, 1) if layout == "torchvision" else (c,))
        self.put(n["head"][0], Affine(widths[-1]))
        self.put(n["head"][1], nn.Linear(widths[-1], classes))

    @staticmethod
    def at(pattern, level, b=0):
        return pattern.format(l=level, b=b, k=2 * level, o=2 * level + 1)

    def forward(self, x):
        n = self.names
        x = self.of(n["stem"][1], self.of(n["stem"][0], x))
        for level, depth in enumerate(self.depths):
            if level:
                norm, conv = (self.at(p, level) for p in n["down"])
                x = self.of(conv, self.of(norm, x))
            for b in range(depth):
                dw, norm, fc1, fc2, gamma = (f"{self.at(n['block'], level, b)}.{p}" for p in n["parts"])
                y = self.of(norm, self.of(dw, x)).movedim(1, -1)
                y = self.of(fc2, F.gelu(self.of(fc1, y))).movedim(-1, 1)
                x = x + y * getattr(self.parts[gamma], gamma.rpartition(".")[2]).view(-1, 1, 1)
        return self.of(n["head"][1], self.of(n["head"][0], x.mean((2, 3))))


class Isotropic(Named):
    """Isotropic ConvNeXt under its official names, with or without gamma."""

    def __init__(self, depth, width, classes, gamma):
        super().__init__()
        self.depth = depth
        self.put("stem", nn.Conv2d(3, width, 16, 16))
        for b in range(depth):
            self.put(f"blocks.{b}.dwconv", nn.Conv2d(width, width, 7, padding=3, groups=width))
            self.put(f"blocks.{b}.norm", Affine(width))
            self.put(f"blocks.{b}.pwconv1", nn.Linear(width, 4 * width))
            self.put(f"blocks.{b}.pwconv2", nn.Linear(4 * width, width))
            if gamma:
                self.scale(f"blocks.{b}.gamma", (width,))
        self.put("norm", Affine(width))
        self.put("head", nn.Linear(width, classes))

    def forward(self, x):
        x = self.of("stem", x)
        for b in range(self.depth):
            y = self.of(f"blocks.{b}.norm", self.of(f"blocks.{b}.dwconv", x)).movedim(1, -1)
            y = self.of(f"blocks.{b}.pwconv2", F.gelu(self.of(f"blocks.{b}.pwconv1", y))).movedim(-1, 1)
            gamma = self.parts.get(f"blocks.{b}.gamma")
            x = x + (y if gamma is None else y * gamma.gamma.view(-1, 1, 1))
        return self.of("head", self.of("norm", x.mean((2, 3))))


class RDNet(Named):
    """RDNet under naver-ai's names (stem.stem, head norm 1e-5) or timm's."""

    def __init__(self, original, init, growths, downsample, classes):
        super().__init__()
        self.prefix = "stem.stem" if original else "stem"
        self.growths = growths
        self.put(f"{self.prefix}.0", nn.Conv2d(3, init, 4, 4))
        self.put(f"{self.prefix}.1", Affine(init))
        c = init
        for i, (growth, half) in enumerate(zip(growths, downsample, strict=True)):
            if i:
                out = c // 2 // 8 * 8
                self.put(f"dense_stages.{i}.0", Affine(c))
                self.put(f"dense_stages.{i}.1", nn.Conv2d(c, out, 1 + half, 1 + half))
                c = out
            for j in range(3):
                at = self.mixer(i, j)
                self.scale(f"{at}.gamma", (growth,))
                self.put(f"{at}.layers.layers.0", nn.Conv2d(c, c, 7, padding=3, groups=c))
                self.put(f"{at}.layers.layers.1", Affine(c))
                self.put(f"{at}.layers.layers.2", nn.Conv2d(c, 4 * c // 8 * 8, 1))
                self.put(f"{at}.layers.layers.4", nn.Conv2d(4 * c // 8 * 8, growth, 1))
                if i >= 2:
                    self.put(f"{at}.layers.layers.5.fc", nn.Conv2d(growth, growth, 1))
                c += growth
        self.put("head.norm", Affine(c, 1e-5 if original else 1e-6))
        self.put("head.fc", nn.Linear(c, classes))

    @staticmethod
    def mixer(i, j):
        return f"dense_stages.{i}.{2 if i else 0}.dense_block{j}"

    def forward(self, x):
        x = self.of(f"{self.prefix}.1", self.of(f"{self.prefix}.0", x))
        for i in range(len(self.growths)):
            if i:
                x = self.of(f"dense_stages.{i}.1", self.of(f"dense_stages.{i}.0", x))
            for j in range(3):
                at = self.mixer(i, j)
                y = self.of(f"{at}.layers.layers.1", self.of(f"{at}.layers.layers.0", x))
                y = self.of(f"{at}.layers.layers.4", F.gelu(self.of(f"{at}.layers.layers.2", y)))
                if i >= 2:
                    s = self.of(f"{at}.layers.layers.5.fc", y.mean((2, 3), keepdim=True))
                    y = y * F.relu6(s + 3) / 6
                x = torch.cat([x, y * self.parts[f"{at}.gamma"].gamma.view(-1, 1, 1)], 1)
        return self.of("head.fc", self.of("head.norm", x.mean((2, 3))))


class DenseNet(Named):
    """DenseNet under torchvision's, gpleiss's or andreasveit's names; ``old`` is torchvision's first layout."""

    def __init__(self, layout, blocks, growth, init, classes, bottleneck=True, compression=0.5, old=False):
        super().__init__()
        self.blocks, self.bottleneck, self.imagenet = blocks, bottleneck, layout == "torchvision"
        self.av = layout == "andreasveit"
        self.dot = "." if old else ""
        if self.imagenet:
            self.put("features.conv0", nn.Conv2d(3, init, 7, 2, 3, bias=False))
            self.put("features.norm0", nn.BatchNorm2d(init))
        else:
            self.put("conv1" if self.av else "features.conv0", nn.Conv2d(3, init, 3, 1, 1, bias=False))
        c = init
        for b, n in enumerate(blocks, 1):
            for i in range(n):
                norm1, conv1, norm2, conv2 = self.layer(b, i)
                self.put(norm1, nn.BatchNorm2d(c))
                if bottleneck:
                    self.put(conv1, nn.Conv2d(c, 4 * growth, 1, bias=False))
                    self.put(norm2, nn.BatchNorm2d(4 * growth))
                    self.put(conv2, nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False))
                else:
                    self.put(conv1, nn.Conv2d(c, growth, 3, 1, 1, bias=False))
                c += growth
            if b < len(blocks):
                norm, conv = self.transition(b)
                self.put(norm, nn.BatchNorm2d(c))
                self.put(conv, nn.Conv2d(c, int(c * compression), 1, bias=False))
                c = int(c * compression)
        self.last = "bn1" if self.av else "features.norm5" if self.imagenet else "features.norm_final"
        self.head = "fc" if self.av else "classifier"
        self.put(self.last, nn.BatchNorm2d(c))
        self.put(self.head, nn.Linear(c, classes))

    def layer(self, b, i):
        if self.av:
            return [f"block{b}.layer.{i}.{p}" for p in ("bn1", "conv1", "bn2", "conv2")]
        names = ("norm", "1"), ("conv", "1"), ("norm", "2"), ("conv", "2")
        return [f"features.denseblock{b}.denselayer{i + 1}.{p}{self.dot}{n}" for p, n in names]

    def transition(self, b):
        at = f"trans{b}" if self.av else f"features.transition{b}"
        return (f"{at}.bn1", f"{at}.conv1") if self.av else (f"{at}.norm", f"{at}.conv")

    def forward(self, x):
        x = self.of("conv1" if self.av else "features.conv0", x)
        if self.imagenet:
            x = F.max_pool2d(F.relu(self.of("features.norm0", x)), 3, 2, 1)
        for b, n in enumerate(self.blocks, 1):
            for i in range(n):
                norm1, conv1, norm2, conv2 = self.layer(b, i)
                y = self.of(conv1, F.relu(self.of(norm1, x)))
                if self.bottleneck:
                    y = self.of(conv2, F.relu(self.of(norm2, y)))
                x = torch.cat([x, y], 1)
            if b < len(self.blocks):
                norm, conv = self.transition(b)
                x = F.avg_pool2d(self.of(conv, F.relu(self.of(norm, x))), 2)
        return self.of(self.head, F.relu(self.of(self.last, x)).mean((2, 3)))


def relative(a, b):
    """Largest difference over the largest entry."""
    return ((a - b).abs().max() / b.abs().max()).item()


def kept_bytes(run):
    """Bytes of all different tensors that autograd keeps from a run until its backward pass."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    return sum(kept.values()), out
