"""Every scheme of the catalogue on the networks that take any: it trains, or is refused with a remedy that does."""

import functools
import re
import warnings

import pytest
import torch

import schemes
from odenets.models import ConvNeXt, HOResNet, ViT
from odenets.models.levels import takes_shortcut
from schemes import SchemeError

# Written out besides: what splits another dimension, and compositions of schemes of several streams.
MORE = ["revnet(dim=2)", "repeat(revnet, 2)", "nested(revnet, euler)"]


@functools.cache
def samples() -> tuple[str, ...]:
    """The examples of the catalogue; of one class of one-stream schemes, which take one path, the first."""
    found, seen = ["rk4", "euler"], set()
    for text in map(str, (*schemes.examples(), *MORE)):
        scheme = schemes.get(text)
        if (takes_shortcut(scheme) or scheme.nodes is None) and type(scheme) in seen:
            continue
        seen.add(type(scheme))
        found.append(text)
    return tuple(dict.fromkeys(found))


def count(scheme: str) -> int:
    """Residual functions of two steps, so that the second one is also seen; of one, where a step has many."""
    stages = schemes.get(scheme).stages
    return stages * (2 if stages < 4 else 1)


def ho_resnet(scheme, functions, **options):
    return HOResNet((functions, functions), (8, 12), scheme=scheme, num_classes=3, stem="conv3", **options)


def bottlenecks(scheme, functions, **options):
    return HOResNet((functions,) * 2, (4, 8), **{"block": "bottleneck", "scheme": scheme, "num_classes": 3, **options})


def convnext(scheme, functions, **options):
    return ConvNeXt((functions, functions), (8, 12), scheme=scheme, num_classes=3, patch=2, **options)


def vit(scheme, functions, **options):
    functions += functions % 2  # attention and perceptron in turn
    if functions % schemes.get(scheme).stages:
        functions *= schemes.get(scheme).stages
    return ViT(functions // 2, 12, 2, scheme, patch=4, size=8, num_classes=3, **options)


def trains(net):
    y = net(torch.randn(2, 3, 8, 8))
    y.square().sum().backward()
    assert y.shape == (2, 3) and y.isfinite().all()
    for key, p in net.named_parameters():
        # Stages that only a companion reads have no part in the output; Stack warns of them.
        assert p.grad is not None or "fs" in key, key


def remedies(text):
    """What a message advises: options as one writes them."""
    return [{key: value} for key, value in re.findall(r"\b(scheme|block|placement)='([^']+)'", text)]


@pytest.mark.cases(19)
@pytest.mark.parametrize(
    ("make", "scheme"),
    [
        *((make, s) for make in (ho_resnet, convnext, vit) for s in samples()),
        # Bottlenecks want widths that four divides, which splits into streams may not give.
        *((bottlenecks, s) for s in samples() if schemes.get(s).streams > 1 and "repeat" not in s),
    ],
)
def test_a_scheme_trains_or_is_refused_with_remedies_that_train(make, scheme):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mixing figures, unused stages
        try:
            net = make(scheme, count(scheme))  # a refusal comes before anything is computed
        except SchemeError as error:
            advised = remedies(str(error))
            assert advised, f"no remedy in: {error}"
            for options in advised:
                other = {"scheme": scheme, **options}
                used = other.pop("scheme")
                trains(make(used, count(used), **other))
            return
        trains(net)


@pytest.mark.long
def test_what_is_refused():
    """By family: so that a refusal of all would not pass for right."""
    refused = {make.__name__: set() for make in (ho_resnet, convnext, vit)}
    for scheme in samples():
        for make in (ho_resnet, convnext, vit):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    with torch.device("meta"):
                        make(scheme, count(scheme))
                except SchemeError:
                    refused[make.__name__].add(scheme)
    # Concatenation and columns have networks of their own; what splits height or width is no scheme of channels.
    maps = {s.partition("(")[0] for s in refused["ho_resnet"] | refused["convnext"] if "dim=" not in s}
    assert {"dense", "multilevel", "revcol"} <= maps <= {"dense", "multilevel", "revcol", "repeat", "2*revcol"}
    assert {"leapfrog", "euler", "revnet(dim=2)"} <= set(samples()) - refused["vit"]
