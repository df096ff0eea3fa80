"""Starting from weights for another head, number of channels, image size or kernel, adapted to fit a network.

``checkpoints.load`` requires the same network; ``start`` is for fine-tuning. Three examples of what it does:

* 21,841 classes in the file, 10 in the network: the head keeps its new weights, and everything else is loaded;
* RGB in the file, grey in the network: the first convolution sums its weights over the channels;
* positions of 14 x 14 patches in the file, 24 x 24 in the network: they are interpolated.

Whatever is left over on either side is listed, or refused, before anything is written.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from schemes import SchemeError

from . import checkpoints
from .layers.attention import PatchTokens
from .messages import first_line
from .models.catalogue import list_models, published_weights, weights_file
from .names import closest

HUB = re.compile(r"hf(?:[-_]hub)?:(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w.-]+))?(?:/(?P<file>[^@]+))?")
WEIGHTS = "model.safetensors"  # as transformers and timm name them
# In order of preference among a repository's files: safetensors first, as they hold no code.
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
# Names of the layer that returns logits, for models that do not name their own.
CLASSIFIERS = ("head", "fc", "classifier", "linear")


@dataclass(frozen=True)
class Adapt:
    """Which tensors of a file may be adapted to a network, besides channels and positions.

    Args:
        averaged: Take averaged weights where a file holds both; False takes the raw ones.
        new_head: True keeps the network's new head even if the file's would fit, False requires the file's; None takes
            the file's if it has as many classes.
        pad_kernels: Place a depthwise or other padded kernel in the centre of a larger one of zeros.
    """

    averaged: bool = True
    new_head: bool | None = None
    pad_kernels: bool = False


@dataclass(frozen=True)
class Started:
    """The outcome of ``start``.

    Attributes:
        source: the name of the file.
        layout: the layout that was found in it.
        loaded: number of tensors written.
        count: number of tensors of the network.
        new: keys of the network that keep its own values.
        adapted: what was adapted, in words.
        dropped: parts of the file that were left out.
    """

    source: str
    layout: str
    loaded: int
    count: int
    new: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Returns a few readable lines: how much was loaded, and everything that was not.

        Example:
            >>> Started("a.pth", "own", 3, 5, ("head.weight", "head.bias")).lines()
            ['a.pth: 3 of 5 tensors (layout: own)', '  new: head.weight, head.bias']
        """
        found = [f"{self.source}: {self.loaded} of {self.count} tensors (layout: {self.layout})"]
        rows = (("new", summed(self.new)), ("adapted", list(self.adapted)), ("left out", summed(self.dropped)))
        return found + [f"  {name}: {', '.join(items)}" for name, items in rows if items]


def start(model: nn.Module, source: str | PathLike[str] | Mapping[str, Any], adapt: Adapt | None = None) -> Started:
    """Loads weights for fine-tuning, all that fits or nothing.

    Args:
        model: the network, with the head, channels, size and kernels that it is to have.
        source: a file, or a folder that holds one; a published tag such as ``resnet50.v1``; a Hub repository such as
            ``hf:OWNER/NAME``; or the contents of a file.
        adapt: which adaptations are allowed.

    Returns:
        What was loaded, adapted and left out.

    Raises:
        SchemeError: no such source; or unexpected tensors, missing ones, shapes that no rule reconciles, or numbers
            that are not finite. The network is then unchanged.

    Example:
        >>> from odenets import create_model
        >>> grey = create_model("resnet20", num_classes=3, in_chans=1)
        >>> done = start(grey, create_model("resnet20").state_dict())
        >>> done.new, done.adapted
        (('head.weight', 'head.bias'), ('stem.conv from 3 channels to 1',))
    """
    name = "state dict" if isinstance(source, Mapping) else str(source)
    held = source if isinstance(source, Mapping) else checkpoints.read(find(source))
    return prepared(model, held, name, adapt).write()


class Prepared:
    """Weights that fit a network, before they are written.

    Args:
        matched: the tensors, and where each goes.
        started: the report that ``write`` will return.
    """

    def __init__(self, matched: checkpoints.Matched, started: Started) -> None:
        self._matched, self.started = matched, started

    def write(self) -> Started:
        """Writes the weights, all at once."""
        self._matched.write()
        return self.started


def prepared(model: nn.Module, held: Mapping[str, Any], name: str, adapt: Adapt | None = None) -> Prepared:
    """Prepares ``start`` from the contents of a file, without writing anything.

    Args:
        model: the network.
        held: the contents of the file, as they were read.
        name: the file's name, for messages.
        adapt: which adaptations are allowed; None takes the defaults.
    """
    rules = _Rules(model, adapt or Adapt())
    matched = checkpoints.matched(model, held, name, rules)
    # A run from non-finite weights would end at its first step, and an evaluation of them would be meaningless.
    if lost := [key for key, value in matched.tensors.items() if not bool(value.isfinite().all())]:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise SchemeError(
            f"{name} holds numbers that are not finite, in {lost[0]}{more}; nothing was loaded\n"
            "  Its training diverged: take an earlier checkpoint."
        )
    report = matched.report
    adapted = [f"{text} ({n})" if n > 1 else text for text, n in Counter(rules.adapted.values()).items()]
    # Norm counters that old files lack are not worth reporting.
    new = tuple(key for key in report.kept if key in rules.kept or not key.endswith("num_batches_tracked"))
    count = len(model.state_dict())
    started = Started(name, report.layout, report.loaded, count, new, tuple(adapted), report.dropped)
    return Prepared(matched, started)


@dataclass
class _Rules:
    """Adapts tensors to one network by the rules of ``Adapt``."""

    model: nn.Module
    adapt: Adapt
    adapted: dict[str, str] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.averaged = self.adapt.averaged
        self.first = getattr(self.model, "first_conv", None)
        self.heads = heads(self.model)

    def left_out(self, key: str) -> bool:
        # The file has a head, or heads between the columns, and the network has none.
        return self.adapt.new_head is not False and key.startswith(("head.", "supervision."))

    def fitted(self, key: str, value: Tensor, shape: torch.Size) -> Tensor:
        if value.shape == shape:
            return value
        path, _, name = key.rpartition(".")
        part = self.model.get_submodule(path) if path else self.model
        if name == "positions" and isinstance(part, PatchTokens):
            return self._noted(key, part.fitted(value), f"{path} from {value.shape[1]} positions to {shape[1]}")
        if name != "weight" or not isinstance(part, nn.Conv2d) or value.dim() != 4:
            return value
        if path == self.first and value.shape[1] != shape[1]:
            text = f"{path} from {value.shape[1]} channels to {shape[1]}"
            value = self._noted(key, with_channels(value, shape[1]), text)
        # With any other padding the centre of the kernel would meet another pixel, and padding it with zeros would
        # shift the map.
        if self.adapt.pad_kernels and value.shape != shape and _padded_by_half(part):
            sides = ["x".join(map(str, s[2:])) for s in (value.shape, shape)]
            value = self._noted(key, with_kernel(value, shape[2], shape[3]), f"kernels from {sides[0]} to {sides[1]}")
        return value

    def _noted(self, key: str, value: Tensor, text: str) -> Tensor:
        self.adapted[key] = text
        return value

    def new(self, fitting: Collection[str]) -> Collection[str]:
        if self.adapt.new_head is False:
            return ()
        own = self.model.state_dict()
        for prefix in self.heads:
            keys = [key for key in own if key.startswith(prefix + ".")]
            # As a whole or not at all: a weight from one task with the bias of another would be neither.
            if (self.adapt.new_head and prefix in self.heads[:1]) or not all(key in fitting for key in keys):
                self.kept.update(keys)
        # Tensors that stay new were not adapted after all.
        self.adapted = {key: text for key, text in self.adapted.items() if key not in self.kept}
        return self.kept


def heads(model: nn.Module) -> list[str]:
    """Returns the parts of a network that may be new: the layer of the logits, then its norm, and intermediate heads.

    Args:
        model: the network.
    """
    modules = dict(model.named_modules())
    given = getattr(model, "classifier", None)
    # torchvision's networks have the layer itself under this name, instead of its name.
    name = given if isinstance(given, str) else next((n for n in CLASSIFIERS if n in modules), None)
    found = [] if name is None else [name]
    found += [n for n in ("head.norm", "head_norm") if n in modules]
    if getattr(model, "supervision", None) is not None:
        found += [n for n in modules if re.fullmatch(r"supervision\.(heads\.\d+\.(norm|fc)|decoders)", n)]
    return found


def with_channels(weight: Tensor, channels: int) -> Tensor:
    """Returns the weight of a first convolution for images with another number of channels, by the rule of timm.

    For one channel, the sum over all; otherwise the channels repeated in turn, times old / new. An image with equal
    channels gives the same output as before for one channel, and for multiples of the old number.

    Args:
        weight: (out, in, h, w).
        channels: the number of channels that replaces ``in``.

    Example:
        >>> import torch
        >>> with_channels(torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1), 4).flatten().tolist()
        [0.75, 1.5, 2.25, 0.75]
    """
    old = weight.shape[1]
    # Half precision would round the sum over the channels.
    wide = weight if weight.dtype is torch.float64 else weight.float()
    if channels == 1:
        wide = wide.sum(1, keepdim=True)
    else:
        wide = wide.repeat(1, math.ceil(channels / old), 1, 1)[:, :channels] * (old / channels)
    return wide.to(weight.dtype)


def with_kernel(weight: Tensor, height: int, width: int) -> Tensor:
    """Returns a kernel (out, in, h, w) centred in a larger one of zeros, or unchanged if it cannot be centred there.

    Args:
        weight: (out, in, h', w').
        height: the new height.
        width: the new width.
    """
    (tall, odd), (wide, odd_too) = divmod(height - weight.shape[2], 2), divmod(width - weight.shape[3], 2)
    if odd or odd_too or tall < 0 or wide < 0:
        return weight
    return nn.functional.pad(weight, (wide, wide, tall, tall))


def _padded_by_half(conv: nn.Conv2d) -> bool:
    """Whether a pixel stays at the centre of the kernel when the kernel grows together with its padding."""
    sides = zip(conv.kernel_size, conv.dilation, strict=True)
    return conv.padding == "same" or conv.padding == tuple(d * (k - 1) // 2 for k, d in sides)


def summed(keys: Iterable[str], most: int = 4) -> list[str]:
    """Summarises keys: those of one part together if there are many.

    Args:
        keys: names with dots.
        most: the largest number of keys that are listed one by one.

    Example:
        >>> summed(["a.b", *(f"decoders.{i}.w" for i in range(9))])
        ['a.b', 'decoders.* (9)']
    """
    keys = list(keys)
    if len(keys) <= most:
        return keys
    parts: dict[str, list[str]] = {}
    for key in keys:
        parts.setdefault(key.partition(".")[0], []).append(key)
    return [own[0] if len(own) == 1 else f"{part}.* ({len(own)})" for part, own in parts.items()]


def is_remote(source: str) -> bool:
    """Whether a source is written as a published tag or a Hub repository, rather than as a file.

    Args:
        source: as typed.

    Example:
        >>> is_remote("resnet50.v1"), is_remote("hf:owner/name"), is_remote("resnet50.pth")
        (True, True, False)
    """
    named = source.partition(".")[0] in list_models() and not source.endswith(SUFFIXES)
    return named or HUB.fullmatch(source) is not None


def find(source: str | PathLike[str]) -> Path:
    """Returns the file of a source: a local one, or one that is downloaded because the source asks for it.

    Downloads only for ``NAME.TAG`` or ``NAME`` of a model with published weights that are not stored yet, and for
    ``hf:OWNER/NAME``, ``hf:OWNER/NAME@REVISION`` or ``hf:OWNER/NAME/FILE``.

    Args:
        source: a path, a tag, or a repository.

    Raises:
        SchemeError: none of these, or a file that cannot be downloaded.
        ImportError: a Hub repository while huggingface_hub is not installed.

    Example:
        >>> find("nowhere.pth")
        Traceback (most recent call last):
        schemes.errors.SchemeError: there is no file nowhere.pth
          Give a file, a published tag such as resnet50.v1, or a Hub repository: hf:OWNER/NAME
    """
    path, text = Path(source), str(source)
    # An existing file wins over a tag or a repository, so that no unintended request is made.
    if path.is_file():
        return path
    if m := HUB.fullmatch(text):
        return _from_hub(text, m["repo"], m["revision"], m["file"])
    if is_remote(text):
        name, _, tag = text.partition(".")
        return weights_file(name, tag or True)
    # After the tags, since a folder of results may well have the name of its network.
    if text and path.is_dir():
        files = [file.name for file in path.iterdir() if file.is_file()]
        return path / (WEIGHTS if WEIGHTS in files else _only_weights(text, files))
    remedy = "Give a file, a published tag such as resnet50.v1, or a Hub repository: hf:OWNER/NAME"
    tags = [f"{m}.{w.tag}" for m in list_models(pretrained=True) for w in published_weights(m)]
    if text.startswith(("hf:", "hf-hub:", "hf_hub:")):
        remedy = "A Hub repository is hf:OWNER/NAME, hf:OWNER/NAME@REVISION or hf:OWNER/NAME/FILE"
    elif not text.endswith(SUFFIXES) and (near := closest(text, tags)):
        remedy = f"Closest: {', '.join(near)}"
    elif re.fullmatch(r"[\w-]+/[\w.-]+", text) and not text.endswith(SUFFIXES):
        remedy = f"If a Hub repository is meant: hf:{text}"
    raise SchemeError(f"there is no file {text}\n  {remedy}")


def _from_hub(source: str, repo: str, revision: str | None, file: str | None) -> Path:
    try:
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise ImportError('huggingface_hub fetches this: pip install "odenets[train]"') from None
    try:
        try:
            # The usual name is tried before the files are listed, which would be one more request.
            return Path(hf_hub_download(repo, file or WEIGHTS, revision=revision))
        except LocalEntryNotFoundError:
            raise  # the Hub was not reached; this is a subclass of EntryNotFoundError
        except EntryNotFoundError:
            if file is not None:
                raise SchemeError(f"{source}: {repo} has no file {file}\n  Look at its files on the Hub.") from None
        name = _only_weights(source, HfApi().list_repo_files(repo, revision=revision))
        return Path(hf_hub_download(repo, name, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SchemeError(
            f"{source} cannot be had: {first_line(error)}\n  Fetch the file by hand, and give its path."
        ) from None


def _only_weights(source: str, files: Iterable[str]) -> str:
    """Returns the only weight file of a repository or folder, by the first suffix that occurs."""
    for suffix in SUFFIXES:
        found = sorted(name for name in files if name.endswith(suffix))
        if len(found) == 1:
            return found[0]
        if found:
            raise SchemeError(f"{source} has several files of weights\n  Give one of them: {source}/{found[0]}, ...")
    raise SchemeError(f"{source} has no file of weights\n  Wanted is one that ends in {', '.join(SUFFIXES)}.")
