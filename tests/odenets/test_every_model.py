"""Laws that hold for every registered model, at a size that a unit test can afford.

A variant's own options make it small: widths are divided, counts of functions, blocks and columns become the least that
its scheme takes. Variants that are then equal are tested once; a model that a function builds is taken as it is.
"""

import copy
import functools
import inspect
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._device import DeviceContext

from odenets import Stack
from odenets.models import FeatureNet, catalogue, list_models
from odenets.models.head import HeadNet
from schemes import MixingWarning, SchemeError

# What the options of a size are called, and to what they shrink. A model whose options have other names is built whole.
WIDTHS = {"widths", "channels", "growths", "init_channels", "growth", "width", "dim"}
COUNTS = {"functions": 1, "units": 2, "blocks": 1, "columns": 2, "depth": 1}  # the least that tells columns apart
LARGEST = 3_000_000  # parameters that one of these tests may have
CLASSES = 5


def narrow(value: Any, heads: int) -> Any:
    """Widths that begin at 8, or as wide as the heads of attention want."""
    if isinstance(value, tuple | list):
        return tuple(max(8, 8 * v // min(value) // 8 * 8) for v in value)
    return value if value is None else 8 * heads


def few(value: Any, count: int) -> Any:
    """The count, or less where there were fewer, and everywhere in a tuple."""
    return tuple(few(v, count) for v in value) if isinstance(value, tuple | list) else count


class Shapes(DeviceContext):
    """Meta tensors, without the seconds that drawing their weights takes."""

    def __init__(self) -> None:
        super().__init__(torch.device("meta"))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_):
            return args[0]
        return super().__torch_function__(func, types, args, kwargs)


@functools.cache
def shrunk(name: str) -> dict[str, Any]:
    """The options of a small version; those given where a function builds the model."""
    entry = catalogue._MODELS[name]
    if entry.kind is None:
        return {"num_classes": CLASSES}
    parameters = inspect.signature(entry.kind).parameters
    given = {k: p.default for k, p in parameters.items()} | dict(entry.options) | {"num_classes": CLASSES}
    given |= {k: narrow(v, given.get("heads", 1)) for k, v in given.items() if k in WIDTHS}
    if "size" in given:
        given["size"] = 2 * given["patch"]
    for count in (1, 2, 4, 14):
        options = given | {k: few(v, max(count, least)) for k, least in COUNTS.items() if (v := given.get(k))}
        try:
            with warnings.catch_warnings(), Shapes():
                warnings.simplefilter("ignore", MixingWarning)
                entry.kind(**options)
        except SchemeError:
            continue
        return options
    raise AssertionError(f"no small version of {name}")


@functools.cache
def cases() -> dict[str, tuple[str, ...]]:
    """The models to test, each with the names of all that are equal when they are small."""
    found: dict[Any, list[str]] = {}
    for name in list_models():
        entry = catalogue._MODELS[name]
        key = name if entry.kind is None else (entry.kind, tuple(sorted((k, str(v)) for k, v in shrunk(name).items())))
        found.setdefault(key, []).append(name)
    return {names[0]: tuple(names) for names in found.values()}


def build(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    entry = catalogue._MODELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MixingWarning)
        return entry.build(**shrunk(name) | options)


@functools.cache
def shared(name: str) -> Any:
    """One small network in evaluation mode, which no test changes, with weights of size 1 so that nothing is idle."""
    net = build(name)
    assert sum(p.numel() for p in net.parameters()) < LARGEST, f"{name} is large, and WIDTHS and COUNTS do not know why"
    with torch.no_grad():
        for key, p in net.named_parameters():
            if key.endswith("gamma"):
                p.fill_(0.5)
    return net.eval()


def pictures(name: str, n: int = 2, rows: int = 2, columns: int = 2, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    r = shared(name).feature_info[-1]["reduction"]
    return torch.randn(n, 3, rows * r, columns * r, dtype=dtype)


def step(net: Any, x: torch.Tensor) -> torch.Tensor:
    """One step of gradient descent in training mode."""
    net.train()
    y = net(x)
    net.zero_grad()
    y.square().sum().backward()
    with torch.no_grad():
        for p in net.parameters():
            p -= 1e-3 * p.grad
    return y


def pytest_generate_tests(metafunc: Any) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", list(cases()))


def test_every_model_stands_in_one_case():
    assert sorted(n for names in cases().values() for n in names) == sorted(list_models())


@pytest.mark.cases(8)
def test_outputs_are_finite_at_square_and_other_sizes(name):
    net = shared(name)
    for n, rows, columns in ((1, 2, 2), (2, 2, 3), (0, 2, 2)):
        with torch.no_grad():
            y = net(pictures(name, n, rows, columns))
        assert y.shape == (n, CLASSES) and y.isfinite().all(), (n, rows, columns)
    empty = copy.deepcopy(net).train()(pictures(name, 0))
    empty.sum().backward()
    assert empty.shape == (0, CLASSES)


@pytest.mark.cases(12)
def test_every_parameter_is_reached(name):
    net = copy.deepcopy(shared(name)).train()
    net(pictures(name, 3)).square().sum().backward()
    for key, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), f"{key} has no gradient"
        # RevCol keeps the published factors of its first column, which multiply nothing.
        assert p.grad.any() or key.startswith("idle."), f"the gradient of {key} is zero"


@pytest.mark.cases(12)
def test_maps_and_feature_info_agree(name):
    net = shared(name)
    assert callable(getattr(net, "maps", None)), f"{name} has no maps"
    assert getattr(net, "feature_info", None), f"{name} has no feature_info"
    x = pictures(name, 1, 2, 3)
    with torch.no_grad():
        maps, every = FeatureNet(copy.deepcopy(net))(x), net.maps(x)
        assert len(every) >= len(maps) == len(net.feature_info)
        # The last map of each resolution, or that which the row names: what was taken out must not have been needed.
        last = {tuple(m.shape[2:]): m for m in every}
        wanted = [
            every[row["map"]] if "map" in row else last[tuple(m.shape[2:])]
            for m, row in zip(maps, net.feature_info, strict=True)
        ]
        assert all(map(torch.equal, maps, wanted))
    for y, row in zip(maps, net.feature_info, strict=True):
        assert y.shape == (1, row["num_chs"], x.shape[2] // row["reduction"], x.shape[3] // row["reduction"]), row
        net.get_submodule(row["module"].partition(":")[0])
    assert net.num_features == net.feature_info[-1]["num_chs"]


@pytest.mark.cases(6)
def test_weights_go_out_and_in(name):
    net, x = shared(name), pictures(name)
    with torch.no_grad():
        want = net(x)
        other = build(name)
        other.load_state_dict(net.state_dict(), strict=True)
        torch.testing.assert_close(other.eval()(x), want, rtol=0, atol=0)


@pytest.mark.cases(5)
def test_copies_and_pickles_before_and_after_a_step(name):
    net, x = copy.deepcopy(shared(name)), pictures(name)
    for _ in range(2):
        with torch.no_grad():
            want = net.eval()(x)
            for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
                torch.testing.assert_close(other(x), want, rtol=0, atol=0)
        step(net, x)


@pytest.mark.cases(8)
@pytest.mark.parametrize("training", [True, False])
def test_a_new_head_has_the_mode_of_the_network(name, training):
    net = build(name, drop_rate=0.5).train(training)
    net.reset_classifier(4)
    assert {m.training for m in net.modules()} == {training}
    if not training:
        with torch.no_grad():
            x = pictures(name)
            assert torch.equal(net(x), net(x))


@pytest.mark.cases(9)
def test_reset_classifier(name):
    net, x = copy.deepcopy(shared(name)), pictures(name)
    features = net.num_features
    for pool in filter(None, net.pools):
        net.reset_classifier(3, pool)
        assert net(x).shape == (2, 3) and net.num_classes == 3
    net.reset_classifier(0)
    assert net(x).shape == (2, features)
    net.reset_classifier(0, "")
    torch.testing.assert_close(net(x), net.forward_features(x))


@pytest.mark.cases(12)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_dtype_is_kept(name, dtype):
    net, x = copy.deepcopy(shared(name)).to(dtype), pictures(name, 2, 2, 3, dtype)
    want = {k: v.dtype for k, v in net.state_dict().items()}
    assert net(x).dtype is dtype and all(y.dtype is dtype for y in net.maps(x))
    if dtype is torch.bfloat16:
        y = step(net, x)
        assert y.dtype is dtype and y.isfinite().all()
        assert all(p.grad.dtype is dtype and p.grad.isfinite().all() for p in net.parameters())
    assert {k: v.dtype for k, v in net.state_dict().items()} == want


def offered(net: Any) -> dict[str, bool]:
    """The modes of backpropagation, and whether the schemes of a network's stacks allow them."""
    stacks = [m for key, m in net.named_modules() if isinstance(m, Stack) and not key.startswith("transitions")]
    back = all(s.scheme.reversible_in_training and s.post_step is None for s in stacks)
    # A shortcut is undone bit by bit where it is a scale.
    scales = all(hasattr(g, "scale") for s in stacks for n in s.steps for g in n.gs or ())
    return {"checkpoint": True, "reverse": back, "exact": back and scales}


@pytest.mark.cases(5)
def test_every_mode_of_backpropagation_gives_the_stored_gradients(name):
    if "backprop" not in inspect.signature(type(shared(name))).parameters:
        return
    x = pictures(name, 3, dtype=torch.float64)
    weights = shared(name).state_dict()

    def gradients(mode: str) -> tuple[torch.Tensor, torch.Tensor]:
        net = build(name, backprop=mode).double()
        net.load_state_dict(weights)
        y = net.train()(x)
        y.square().sum().backward()
        return y, torch.cat([p.grad.flatten() for p in net.parameters()])

    y, want = gradients("store")
    allowed = offered(shared(name))
    for mode, tolerance in (("checkpoint", 1e-9), ("reverse", 1e-6), ("exact", 1e-6)):
        if not allowed[mode]:
            with pytest.raises(SchemeError, match=r"inverse|undo"):
                build(name, backprop=mode)
            continue
        z, got = gradients(mode)
        assert (z - y).norm() <= tolerance * y.norm(), mode
        assert (got - want).norm() <= tolerance * want.norm(), mode


def families() -> dict[str, str]:
    """The first model of each class."""
    found: dict[str, str] = {}
    for name in cases():
        if (kind := catalogue._MODELS[name].kind) is not None:
            found.setdefault(kind.__name__, name)
    return found


@pytest.mark.cases(1)
@pytest.mark.parametrize("family", list(families()))
def test_a_family_exports_with_a_dynamic_batch(family):
    net = shared(families()[family])
    x = pictures(families()[family], 3)
    module = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},)).module()
    more = torch.cat([x, x.flip(3)])
    torch.testing.assert_close(module(more), net(more), rtol=1e-4, atol=1e-5)


@pytest.mark.cases(6)
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("family", list(families()))
def test_torch_fx_traces_a_family_at_its_first_call(family, pad):
    name = families()[family]
    net, x = build(name, pad=pad).eval(), pictures(name, 2)
    net.load_state_dict(shared(name).state_dict())
    traced = torch.fx.symbolic_trace(net)
    for given in (x, torch.cat([x, x.flip(3)]), pictures(name, 1, 2, 4)):
        torch.testing.assert_close(traced(given), net(given), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", list(families()))
def test_a_family_runs_as_onnx(family, tmp_path):
    from odenets.export import export

    pytest.importorskip("onnxruntime")
    x = pictures(families()[family], 1)
    assert export(shared(families()[family]), tmp_path / "net.onnx", tuple(x.shape[1:])).difference <= 1e-5  # type: ignore


@pytest.mark.parametrize("family", list(families()))
def test_a_family_pads_or_names_the_multiple(family):
    name = families()[family]
    net, odd = shared(name), copy.deepcopy(shared(name))
    x = pictures(name, 1, 2, 2)[..., :-1, 1:]
    if net.whole and net.reduction > 1:
        with pytest.raises(SchemeError, match=rf"multiples of {net.reduction}\b.*\n.*pad=True"):
            net(x)
    else:
        assert net(x).isfinite().all()
    odd.pad = True
    padded = nn.functional.pad(x, (0, 1, 0, 1)) if net.reduction > 1 else x
    torch.testing.assert_close(odd(x), net(padded))
    if net.whole or net.least > 1:
        with pytest.raises(SchemeError, match=r"want at least|want multiples"):
            net(x[..., : net.least - 1, :] if not net.whole else x[..., :1, :1])


def test_the_shared_options_are_those_of_the_command_line():
    jsonargparse = pytest.importorskip("jsonargparse")
    common = set(inspect.signature(HeadNet).parameters)
    for name in families().values():
        kind = catalogue._MODELS[name].kind
        options = inspect.signature(kind).parameters
        assert common <= set(options), kind
        parser = jsonargparse.ArgumentParser()
        parser.add_class_arguments(kind, "net")
        defaults = parser.get_defaults().net
        # What a subclass hands on is read from its source: one call of super().__init__(**head) that it can follow.
        assert vars(defaults).keys() == options.keys(), kind
        assert all(defaults[k] == p.default or tuple(defaults[k]) == p.default for k, p in options.items()), kind
