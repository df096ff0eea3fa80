"""Loading and saving weights: published state dicts, training checkpoints and files load as a whole, or not at all.

``load`` changes nothing unless every key fits: it first matches the contents of a file, lists all misfits in one error,
and only then writes the model. A model that knows published layouts has a method ``key_map(keys)``; three examples:

* a torchvision ResNet has ``layer1.0.conv1.weight``, the model ``levels.0.steps.0.fs.0.conv1.weight``;
* a Lightning checkpoint holds the net under ``state_dict`` with the prefix ``net.``, compiled ones add ``_orig_mod.``;
* the same net under another scheme groups its residual functions into other steps.
"""

import argparse
import io
import pickle
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from os import PathLike
from pathlib import Path, PosixPath, PurePosixPath
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from schemes.errors import SchemeError

from .continuous import expected_shapes
from .extras import MissingExtra, install
from .messages import first_line

# In order of preference: averaged weights before raw ones, as in timm.
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema")
CONTAINERS = (*AVERAGED, "state_dict", "model_state_dict", "model", "net", "params")
PREFIXES = ("module.", "net.", "model.", "backbone.")
# Where Lightning's callbacks store the raw weights when averaged ones take their place.
RAW = "current_model_state"
COMPILED = "_orig_mod."
# Files older than BatchNorm's counter lack it, and it matters only with momentum=None.
COUNTER = re.compile(r"(^|\.)num_batches_tracked$")
# Files of nets with a fixed step size hold none, so that a learned one keeps the value that it starts from. No file
# says whether the two are equal; `Report.kept` lists them.
LEARNED = re.compile(r"(?P<stack>^|.*\.)steps\.\d+\.h$")
LISTED = 10
IMPLIED = "_implied_by_weights"  # the attribute of a model that remembers what it was built with


class KeyMap(NamedTuple):
    """The keys of a published layout and their names in a model.

    Attributes:
        layout: its name.
        names: published key -> key of the model; None drops a key on purpose (a head that is not wanted).
        settings: numbers that the layout implies but no tensor holds, by attribute path ("head_norm.eps").
    """

    layout: str
    names: Mapping[str, str | None]
    settings: Mapping[str, float] = MappingProxyType({})


@runtime_checkable
class Renames(Protocol):
    """A model that knows published layouts of its weights."""

    def key_map(self, keys: Collection[str]) -> KeyMap | None:
        """Returns the model's names for these keys, or None for an unknown layout; keys without an entry are refused.

        Args:
            keys: all keys of a file.
        """
        ...


class Report(NamedTuple):
    """The outcome of ``load``.

    Attributes:
        loaded: number of tensors written.
        layout: the layout that it found, "own" for the model's own keys.
        dropped: keys of the source that were left out on purpose.
        kept: keys of the model that are missing from the source, and optional; they keep their values. A learned step
            size is among them where the source has a fixed one, which need not be equal.
    """

    loaded: int
    layout: str
    dropped: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def load(model: nn.Module, source: Mapping[str, Any] | str | PathLike[str]) -> Report:
    """Loads weights into a model, all or nothing.

    Unwraps training checkpoints, prefers averaged weights over raw ones, strips the prefixes of DDP, torch.compile and
    Lightning, and renames published keys.

    Args:
        model: the model; written only if everything fits.
        source: a state dict, a checkpoint dictionary that holds one, or a file (.safetensors, .pt, .pth, .ckpt; read
            with ``weights_only``).

    Returns:
        A ``Report``.

    Raises:
        SchemeError: unexpected keys, missing keys or other shapes, all listed; an unreadable or unsafe file.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> load(nn.Linear(2, 2), {"state_dict": {"module.weight": torch.ones(2, 2), "module.bias": torch.ones(2)}})
        Report(loaded=2, layout='own', dropped=(), kept=())
    """
    held = source if isinstance(source, Mapping) else read(source)
    return matched(model, held, "state dict" if isinstance(source, Mapping) else str(source)).write()


class Adapting(Protocol):
    """Rules for adapting a file that is not of exactly the same model."""

    averaged: bool

    def left_out(self, key: str) -> bool:
        """Whether a tensor of the file that has no place in the model may be left out.

        Args:
            key: the file's name of the tensor.
        """
        ...

    def fitted(self, key: str, value: Tensor, shape: torch.Size) -> Tensor:
        """Returns the tensor in the shape that the model expects under this key, or unchanged if it cannot be adapted.

        Args:
            key: the model's name of the tensor.
            value: the tensor as the file holds it.
            shape: the shape that the model expects.
        """
        ...

    def new(self, fitting: Collection[str]) -> Collection[str]:
        """Returns the keys of the model that keep its own values, given those for which the file has a fitting tensor.

        Args:
            fitting: the model's keys for which the file has a tensor that fits.
        """
        ...


class Matched:
    """The tensors of a file, matched to the keys of a model but not written yet.

    Args:
        model: the network that ``write`` writes to.
        settings: numbers that a layout implies but no tensor holds, such as an epsilon.

    Attributes:
        report: the outcome that ``write`` will have.
        tensors: by the model's keys.
    """

    def __init__(self, model: nn.Module, report: Report, tensors: dict[str, Tensor], settings: Mapping[str, float]):
        self.model, self.report, self.tensors, self.settings = model, report, tensors, settings

    def write(self) -> Report:
        """Writes the tensors, all at once."""
        # Completed by the model's own values for keys that the file may lack.
        self.model.load_state_dict({**self.model.state_dict(), **self.tensors})
        set_implied(self.model, self.settings)
        return self.report


def set_implied(model: nn.Module, settings: Mapping[str, float]) -> None:
    """Sets the numbers that the layout of loaded weights implies, after taking back those of earlier weights.

    Args:
        model: the model.
        settings: as in ``KeyMap``.
    """
    # Numbers such as an epsilon, in which layouts differ without a tensor that shows it.
    own = {path: built_with(model, path) for path in {**_implied(model), **settings}}
    for path, number in {**own, **settings}.items():
        module, _, name = path.rpartition(".")
        setattr(model.get_submodule(module), name, number)
    if own:
        model.__dict__[IMPLIED] = {path: (own[path], number) for path, number in settings.items()}


def built_with(model: nn.Module, path: str) -> Any:
    """Returns a number as it was before weights were loaded whose layout implies another.

    Args:
        model: the model.
        path: its attribute path, as in ``KeyMap.settings``.
    """
    present = _present(model, path)
    own, implied = _implied(model).get(path, (present, present))
    # Otherwise it was changed since, on purpose.
    return own if present == implied else present


def check_saved(model: nn.Module) -> None:
    """Checks that a file of the weights loses no number that their layout implies.

    Args:
        model: the model, or a module around it.

    Raises:
        SchemeError: a new model would have another.
    """
    for module in model.modules():
        for path, (own, number) in _implied(module).items():
            if own != number and _present(module, path) == number:
                raise SchemeError(
                    f"{path} = {number:g}, which the layout of the loaded weights implies, is in no file of weights, "
                    f"and {type(module).__name__} was built with {own}.\n  Build it with the number of the weights "
                    f"(as {path.replace('.', '_')}={number:g} of RDNet), and load them again."
                )


def _present(model: nn.Module, path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(model.get_submodule(module), name, None)


def _implied(model: nn.Module) -> dict[str, tuple[Any, float]]:
    """The number that a model was built with, and the one that its weights imply, by path."""
    return model.__dict__.get(IMPLIED, {})


# long: each kind of misfit is detected in one pass over the keys
def matched(model: nn.Module, held: Mapping[str, Any], name: str, adapting: Adapting | None = None) -> Matched:
    """Matches everything that a file holds to the keys of a model, without writing it.

    Args:
        model: the model.
        held: a state dict, or a checkpoint dictionary that holds one.
        name: the file's name, for messages.
        adapting: rules for adapting tensors; None requires equal keys and shapes.

    Raises:
        SchemeError: as ``load``.
    """
    state, dropped = _unwrap(held, name, adapting is None or adapting.averaged)
    own = model.state_dict()
    # Prefixes are stripped first: published layouts are recognised by their keys, which a wrapper has changed.
    state, outside = _strip(model, state, own)
    # Weights that are functions of depth take the file's knots: the function matters, not the basis it is written in.
    shapes = expected_shapes(model, state, own)
    dropped += outside
    # The model's own keys are never renamed, whatever layout they may look like.
    known = model.key_map(state.keys()) if isinstance(model, Renames) and state.keys() != own.keys() else None
    layout, names, settings = known or KeyMap("own", {k: k for k in state})

    found: dict[str, Tensor] = {}
    placed: set[str] = set()
    unmatched: list[str] = []
    misshapen: dict[str, str] = {}
    unusable: list[str] = []
    for key, value in state.items():
        target = names.get(key, key)
        if target is None:
            dropped.append(key)
            continue
        if adapting and target not in own and adapting.left_out(target):
            dropped.append(key)
            continue
        # Two keys for one place: there is no telling which was meant.
        if target not in own or target in placed:
            unmatched.append(key)
            continue
        placed.add(target)
        # Layouts write a matrix as a 1x1 convolution, or a vector as (c, 1, 1): the same numbers in the same order.
        if known and value.layout == torch.strided and same_numbers(value.shape, shapes[target]):
            value = value.reshape(shapes[target])
        if problem := _unusable(value, own[target]):
            unusable.append(f"{key} is {problem}")
            continue
        if adapting:
            value = adapting.fitted(target, value, shapes[target])
        if value.shape == shapes[target]:
            found[target] = value
        else:
            misshapen[target] = f"{key} is {tuple(value.shape)}, want {tuple(shapes[target])}"
    new = set(adapting.new(found.keys())) if adapting else set()
    found = {key: value for key, value in found.items() if key not in new}
    wrong = [text for target, text in misshapen.items() if target not in new]
    absent = [k for k in own if k not in placed or k in new]
    missing = _needed([k for k in absent if k not in new], placed)
    if unmatched or wrong or unusable or missing:
        raise SchemeError(_misfits(model, name, unmatched, wrong, unusable, missing, adapting is not None))
    return Matched(model, Report(len(found), layout, tuple(dropped), tuple(absent)), found, settings)


def published_keys(
    model: nn.Module, source: Mapping[str, Any] | str | PathLike[str], name: str = "state dict"
) -> tuple[dict[str, Tensor], KeyMap | None]:
    """Returns the tensors of a file under published keys, without the prefixes of wrappers, and the model's names.

    Args:
        model: the model.
        source: as in ``load``.
        name: the source's name, for messages.

    Returns:
        The tensors, and the map of their keys to the model's; None for the model's own keys, and for unknown layouts.
    """
    state, _ = _unwrap(source if isinstance(source, Mapping) else read(source), name)
    own = model.state_dict()
    state, _ = _strip(model, state, own)
    known = model.key_map(state.keys()) if isinstance(model, Renames) and state.keys() != own.keys() else None
    return state, known


def save(model: nn.Module, path: str | PathLike[str]) -> None:
    """Writes a model's weights as safetensors, which holds tensors and no code; ``load`` reads them.

    Args:
        model: the model.
        path: the file, ``*.safetensors`` by convention; its folder is created if missing.

    Raises:
        SchemeError: the weights were loaded from a layout that implies a number that no tensor holds and that a new
            model would not have.
        ImportError: safetensors is not installed.
    """
    check_saved(model)
    save_tensors(model.state_dict(), path)


def save_tensors(tensors: Mapping[str, Tensor], path: str | PathLike[str]) -> None:
    """Writes tensors as safetensors; see ``save``.

    Args:
        tensors: by name.
        path: the file.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise MissingExtra(f"safetensors writes this file: {install('train')}", name="safetensors") from None
    # Clones, since safetensors refuses tensors that share memory, and requires contiguous ones.
    whole = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(whole, str(path), metadata={"format": "pt"})


def read(path: str | PathLike[str]) -> Mapping[str, Any]:
    """Reads a weight file onto the CPU, without running any code in it.

    Args:
        path: a .safetensors file, or one written by torch.save.

    Raises:
        SchemeError: no such file, a file that cannot be read, or one that holds more than tensors and plain values.
        ImportError: a .safetensors file while safetensors is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise SchemeError(f"no weight file at {path}; give a .safetensors, .pt, .pth or .ckpt file, or a state dict.")
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError:
            raise MissingExtra(f"{path.name} is read by safetensors: {install('train')}", name="safetensors") from None
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise SchemeError(f"{path} cannot be read: {error}. Is the file whole?") from None
    try:
        # Only these types are created besides tensors, so that no code of the file is run.
        with torch.serialization.safe_globals(_harmless()), _Bounded(path) as file:
            held = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise SchemeError(
            f"{path} holds more than tensors and plain values (or is no torch file), and is not opened.\n"
            "  Where you trust its origin, save its state_dict alone, then load that."
        ) from None
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        what = first_line(error) if str(error) else "empty"
        kind = "" if isinstance(error, EOFError | OSError | RuntimeError) else f"{type(error).__name__}: "
        raise SchemeError(f"{path} cannot be read: {kind}{what}. Is the file whole?") from None
    if not isinstance(held, Mapping):
        raise SchemeError(f"{path} holds a {type(held).__name__}, want a state dict or a checkpoint that holds one.")
    return held


class _Bounded(io.BufferedReader):
    """A file whose reads are capped at its size: a damaged length would be allocated before the read fails."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))
        self._length = path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """Reads at most ``size`` bytes, by default all that are left."""
        left = max(0, self._length - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def _harmless() -> list[Any]:
    """Types that published files hold besides tensors; constructing any of them has no side effects."""
    found: list[Any] = [argparse.Namespace, SimpleNamespace, PosixPath, PurePosixPath]
    numpy = sys.modules.get("numpy")
    if numpy is not None:  # numbers such as the best accuracy
        scalar = numpy.float64(0).__reduce__()[0]
        found += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
        found += [numpy.dtype, *(type(numpy.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?"))]
    return found


def _needed(absent: Collection[str], placed: Iterable[str]) -> list[str]:
    """Returns the keys that a file may not lack, of those that it lacks; `placed` are those that it has."""
    # A file with some of a stack's step sizes is of another stack, whose steps are not these.
    learned = {found["stack"] for key in placed if (found := LEARNED.match(key))}
    steps = {key: found["stack"] for key in absent if (found := LEARNED.match(key))}
    return [key for key in absent if not COUNTER.search(key) and (key not in steps or steps[key] in learned)]


def _unusable(value: Tensor, own: Tensor) -> str:
    """Returns why a tensor's numbers cannot be copied into another tensor, or "" if they can."""
    if value.is_nested or value.layout != torch.strided:
        return f"not dense ({str(value.layout).removeprefix('torch.')})"
    if value.is_quantized:
        return "quantised"
    if value.is_meta:
        return "on the meta device, without numbers"
    if own.is_meta:
        return "wanted on the meta device; give the model memory first: to_empty"
    kind = str(own.dtype).removeprefix("torch.")
    if not torch.can_cast(value.dtype, own.dtype):
        return f"{str(value.dtype).removeprefix('torch.')}, want {kind}"
    if own.is_floating_point() and _largest(value.dtype) > _largest(own.dtype):
        # In float64, since isfinite is not implemented for every dtype.
        if bool((~value.to(own.dtype).double().isfinite() & value.double().isfinite()).any()):
            return f"beyond the range of {kind}"
    return ""


def _largest(kind: torch.dtype) -> float:
    """Returns the largest number of a real dtype."""
    if kind == torch.bool:
        return 1.0
    return torch.finfo(kind).max if kind.is_floating_point else float(torch.iinfo(kind).max)


def _unwrap(held: Mapping[str, Any], name: str, averaged: bool = True) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the innermost state dict of a training checkpoint, and the other weights that are left out."""
    beside: list[str] = []
    order = CONTAINERS if averaged else (RAW, *CONTAINERS[len(AVERAGED) :], *AVERAGED)
    # A Lightning checkpoint around a state dict around a wrapper; deeper nesting is something else.
    for _ in range(3):
        found = [c for c in order if isinstance(held.get(c), Mapping) and held[c]]
        if not found:
            break
        if found[0] in AVERAGED:
            beside += [f"{c} (raw; the averaged {found[0]} is loaded)" for c in found[1:]]
        else:
            beside += [f"{c} (beside {found[0]}, which is loaded)" for c in found[1:] if _holds_tensors(held[c])]
        held = held[found[0]]
    others = [str(k) for k, v in held.items() if not isinstance(v, Tensor) or not isinstance(k, str)]
    if others or not held:
        what = f"entries that are no tensors: {_some(others)}" if others else "no tensors"
        raise SchemeError(f"the {name} has {what}; want a state dict, or one under {', '.join(CONTAINERS)}.")
    return dict(held), beside


def _holds_tensors(held: Mapping[str, Any]) -> bool:
    return any(isinstance(v, Tensor) or (isinstance(v, Mapping) and _holds_tensors(v)) for v in held.values())


def _strip(
    model: nn.Module, state: dict[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the state without the prefixes that wrappers add, and the keys outside the wrapped net."""
    # If a part of the model is compiled, the prefix belongs to the model's own keys.
    if not any(COMPILED in key for key in own):
        state = {key.replace(COMPILED, ""): value for key, value in state.items()}
    dropped: list[str] = []
    # Only as long as no key fits, since a net may have a part named `net`.
    while not (state.keys() & own.keys()) and not (isinstance(model, Renames) and model.key_map(state.keys())):
        prefix = next((p for p in PREFIXES if any(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        # For example the buffers of a loss, which is next to the net in a Lightning module.
        dropped += [key for key in state if not key.startswith(prefix)]
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return state, dropped


def same_numbers(a: torch.Size, b: torch.Size) -> bool:
    """Whether shapes differ in axes of length 1 alone, so that the numbers are the same in the same order.

    Args:
        a: one shape.
        b: the other.
    """
    return [size for size in a if size != 1] == [size for size in b if size != 1]


def _some(items: Iterable[str], most: int = LISTED) -> str:
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def _misfits(
    model: nn.Module,
    name: str,
    unmatched: list[str],
    misshapen: list[str],
    unusable: list[str],
    missing: list[str],
    adapted: bool,
) -> str:
    kinds = {
        "without a place": unmatched,
        "of another shape": misshapen,
        "that cannot be copied": unusable,
        "missing": missing,
    }
    listed = 3 if adapted else LISTED
    parts = [f"{len(items)} {what}: {_some(items, listed)}" for what, items in kinds.items() if items]
    article = "the " if name == "state dict" else ""
    text = f"{article}{name} does not fit {type(model).__name__}; nothing was loaded. " + "; ".join(parts) + "."
    if adapted:
        return text + "\n  Build the network that the file is of; its head, channels, positions and kernels may differ."
    if (
        not unmatched
        and not missing
        and not unusable
        and all(m.startswith(("head.", "fc.", "linear.")) for m in misshapen)
    ):
        text += "\n  Build the model with the file's number of classes, load, then call reset_classifier."
    return text
