"""A small net with the constructor of the real models, for where the command line is tested and not the model."""

from typing import Literal

import torch
from torch import Tensor, nn

from schemes import SchemeError


class HOResNet(nn.Module):
    def __init__(
        self,
        scheme: str = "rk4",
        functions: list[int] = [4, 4, 4],  # noqa: B006
        widths: list[int] = [16, 32, 64],  # noqa: B006
        block: Literal["basic", "bottleneck"] = "basic",
        num_classes: int = 10,
        in_chans: int = 3,
        stem: Literal["cifar", "imagenet"] = "cifar",
        placement: Literal["public", "preact"] = "public",
        step: float | str = 1.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        backprop: str = "store",
    ) -> None:
        super().__init__()
        if scheme not in ("euler", "midpoint", "rk4", "verner8"):
            raise SchemeError(f"scheme {scheme!r}: no such name\n  Closest: rk4")
        self.stem = nn.Conv2d(in_chans, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.h = nn.Parameter(torch.ones(()))
        self.step = 1.0
        self.head = nn.Linear(8, num_classes)
        self.evaluations = sum(functions)

    def set_step(self, h: float) -> None:
        self.step = h

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.step * self.h * self.body(x).relu()
        return self.head(x.mean((2, 3)))


class ResNet(HOResNet):
    pass
