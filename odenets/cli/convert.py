"""`odenets convert`: converts weight files from published keys to ours, and back."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from schemes import SchemeError

from .. import checkpoints
from ..layouts import Converted, to_layout, to_own
from ..messages import fail
from ..models.catalogue import create_model
from . import words as w

TEXT = """Writes the weights of a model under other keys: from a published file (or a checkpoint of a run) to the keys
of this library, or with --like PUBLISHED back to the keys and shapes of that file, which may be any published weights
of the same model. Numbers keep their type. Nothing is written unless every key fits.

  odenets convert resnet50-11ad3fa6.pth --model resnet50 --output resnet50.safetensors
  odenets convert mine.safetensors --model resnet50 --like resnet50-11ad3fa6.pth --output mine.pth

Exit status: 0; 2 if nothing was written."""
ENDINGS = (".safetensors", ".pth", ".pt")


def parser() -> w.Parser:
    """The options."""
    found = w.Parser(prog="odenets convert", description=TEXT)
    found.add_argument("weights", metavar="WEIGHTS", help="a .safetensors, .pth, .pt or .ckpt file")
    found.add_argument("--model", required=True, metavar="NAME", help="one of `odenets models`")
    found.add_argument("--output", type=Path, required=True, metavar="FILE", help="FILE.safetensors, .pth or .pt")
    found.add_argument("--like", metavar="PUBLISHED", help="a file in the layout to write; without it our own keys")
    found.add_argument("--num_classes", type=w.count, help="width of the head; default: that of WEIGHTS; 0 for none")
    found.add_argument("--in_chans", type=w.positive, help="channels of the pictures; default: the model's own")
    found.add_argument("--scheme", help="a scheme in place of the model's own")
    found.add_argument("--json", action="store_true", help="print what was written as JSON")
    return found


def run(args: Sequence[str]) -> None:
    """Runs one command line; errors that the user can fix end in two lines and exit status 2."""
    options = parser().parse(args)
    try:
        _run(options)
    except SchemeError as e:
        fail(str(e), "odenets convert --help shows how it is used")


def _run(options: Any) -> None:
    path: Path = options.output
    if path.suffix.lower() not in ENDINGS:
        raise SchemeError(f"--output {path}: want a name that ends in {', '.join(ENDINGS)}")
    held = checkpoints.read(options.weights)
    given = {"in_chans": options.in_chans, "scheme": options.scheme}
    classes = options.num_classes
    # Built twice if need be: only a model's names tell which tensors of a file are its head.
    net = create_model(options.model, num_classes=classes, **given)
    if classes is None and (found := _classes(net, held)) is not None:
        net = create_model(options.model, num_classes=found, **given)
    # Loading casts to the model's type, which would round numbers of 64 bits, and double files of 16.
    net.to(_dtype(net, held))
    done = to_own(net, held)
    if options.like is not None:
        back = to_layout(net, options.like)
        done = back._replace(left=done.left + back.left)
    _write(done.tensors, path)
    _say(done, path, options.json)


def _classes(net: nn.Module, held: Mapping[str, Any]) -> int | None:
    """The number of classes of a file whose head has another width than the model's; else None."""
    own = net.state_dict()
    state, known = checkpoints.published_keys(net, held)
    for key, value in state.items():
        target = (known.names.get(key) if known else key) or ""
        # The tensor of the head that has one entry for each class, and no other dimension.
        if target.startswith("head.") and own[target].shape == (net.num_classes,) != value.shape and value.ndim == 1:
            return len(value)
    return None


def _dtype(net: nn.Module, held: Mapping[str, Any]) -> torch.dtype:
    """The type of a file's numbers; of several, the one that holds them all."""
    state, _ = checkpoints.published_keys(net, held)
    found = {value.dtype for value in state.values() if value.is_floating_point()}
    return reduce(torch.promote_types, found) if found else torch.get_default_dtype()


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written beside the file and moved into its place at once: a reader never sees half of it.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            part = Path(folder) / path.name
            if path.suffix.lower() == ".safetensors":
                checkpoints.save_tensors(tensors, part)
            else:
                # Cloned: torch.save writes the whole storage of a view.
                torch.save({key: value.detach().cpu().clone() for key, value in tensors.items()}, part)
            os.replace(part, path)
    except OSError as e:
        raise SchemeError(f"{path} cannot be written: {e.strerror or e}\n  Give another file.") from None


def _say(done: Converted, path: Path, as_json: bool) -> None:
    if as_json:
        said = {"path": str(path), "layout": done.layout, "tensors": len(done.tensors), "left": list(done.left)}
        w.write(w.as_json({**said, "bytes": path.stat().st_size}), None)
        return
    layout = "our own keys" if done.layout == "own" else f"keys of {done.layout}"
    print(f"{path}: {len(done.tensors)} tensors, {layout}")
    if done.left:
        print(f"left out: {', '.join(done.left)}")
