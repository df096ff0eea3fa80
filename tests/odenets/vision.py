"""Imports timm and torchvision where they are, also beside a torch that torchvision was not built for."""

import importlib
import sys

import pytest
import torch

_declared = []  # a library that is let go of takes its operators along


def vision(name):
    """timm, torchvision or a package upon them; the test skips with the reason where it cannot be imported.

    A torchvision that was built for another torch lacks its own operators. They are declared then, and never called.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported ({error}); docs/pages/contributing.md has the second environment")
    except RuntimeError:
        for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[module]
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    return importlib.import_module(name)
