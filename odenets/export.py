"""Export of a network to a file that runs without this package: ONNX, or torch.export's .pt2, checked before it exists.

The graph is traced once, by ``torch.export``, in evaluation mode and without gradients, where every scheme is plain
arithmetic, however the network was trained (stored, checkpointed, reversed, exact). The file is written to a temporary
place, read back, and compared with the network, also on batches of other sizes than the traced one.
"""

import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from schemes.errors import SchemeError

Format = Literal["onnx", "pt2"]
TRACED, CHECKED = 2, (1, 3)  # batches: a dimension of one would be traced as fixed
NOTES = "odenets.json"  # in a .pt2 file, the equivalent of an ONNX file's metadata


class Exported(NamedTuple):
    """The result of ``export``.

    Attributes:
        path: the file.
        format: "onnx" or "pt2".
        difference: the largest difference between its outputs and the network's, divided by their largest magnitude
            or 1, whichever is larger; of finite outputs, the others are equal.
        shape: of its input; a name stands for any number.
    """

    path: Path
    format: Format
    difference: float
    shape: tuple[int | str, ...]


def export(
    net: nn.Module,
    path: str | PathLike[str],
    shape: tuple[int, int, int],
    format: Format | None = None,
    *,
    dynamic_size: bool = False,
    tolerance: float = 1e-5,
    notes: Mapping[str, Any] | None = None,
) -> Exported:
    """Writes a network, for any batch size, as a file that runs elsewhere.

    Args:
        net: maps images (n, c, h, w) to one tensor; traced in evaluation mode, and left unchanged.
        path: the file; written only if its outputs agree with the network's.
        shape: of an image: channels, height, width.
        format: "onnx" or "pt2"; None infers it from the path's suffix.
        dynamic_size: whether height and width may vary, in multiples of the network's ``reduction``.
        tolerance: largest difference of outputs, relative to their largest magnitude where that exceeds 1.
        notes: plain values stored in the file, as JSON.

    Raises:
        SchemeError: an unknown format, a network that cannot be traced, outputs that differ, or a failed write.
        ImportError: ONNX without the extra ``export``.

    Example:
        >>> import tempfile, torch
        >>> from odenets import create_model, export
        >>> net = create_model("ho_resnet26", widths=(4, 4, 4), num_classes=5)
        >>> done = export.export(net, f"{tempfile.mkdtemp()}/net.pt2", (3, 32, 32))
        >>> done.shape, done.difference < 1e-5
        (('n', 3, 32, 32), True)
    """
    path = Path(path)
    kind = _format(path, format)
    if kind == "onnx":
        _require_onnx()
    # The network's own dtype and device: it takes no other images.
    like = next(net.parameters())
    # A generator of its own: an export in the middle of a run must not advance the run's random state.
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, *shape, generator=generator).to(like) for n in (TRACED, *CHECKED)]
    with _in_evaluation(net):
        dims: dict[int, Any] = {0: torch.export.Dim("n", min=1)}
        if dynamic_size:
            dims |= _sizes(net, shape)
            # Taller alone, to detect a graph that assumes equal height and width.
            taller = torch.randn(1, shape[0], shape[1] + _reduction(net), shape[2], generator=generator)
            batches.append(taller.to(like))
        wanted = [net(x) for x in batches]
        program = _traced(net, batches[0], dims)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, since a rename is atomic only within one file system.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            part = Path(folder) / f"net.{kind}"
            text = json.dumps(dict(notes or {}), ensure_ascii=False)
            run = (_onnx if kind == "onnx" else _pt2)(program, part, text)
            difference = _difference(net, kind, _outputs(net, run, batches), wanted, tolerance)
            replace(part, path)
    except OSError as e:
        raise SchemeError(f"{path} cannot be written: {e.strerror or e}\n  Give another file.") from None
    names: list[int | str] = ["n", *shape]
    for axis, name in ((2, "h"), (3, "w")) if dynamic_size else ():
        names[axis] = name
    return Exported(path, kind, difference, tuple(names))


def _format(path: Path, given: str | None) -> Format:
    known = get_args(Format)
    suffix = path.suffix.lower()[1:]
    kind = given or suffix
    if kind not in known:
        what = f"the format {given!r}" if given else f"a file that ends in {path.suffix!r}"
        raise SchemeError(f"export: {what} is not known\n  Wanted: {' or '.join(known)}, as .onnx or .pt2.")
    if suffix in known and suffix != kind:
        raise SchemeError(f"export: {path.name} ends in .{suffix}, and the format is {kind}\n  Give one of the two.")
    return kind  # type: ignore[return-value]


def _require_onnx() -> None:
    try:
        import onnx as onnx
        import onnxruntime as onnxruntime
        import onnxscript as onnxscript
    except ImportError as e:
        raise ImportError(f'ONNX needs the package {e.name}: pip install "odenets[export]"') from None


@contextmanager
def _in_evaluation(net: nn.Module) -> Iterator[None]:
    """Within it, evaluation mode without gradients; on exit every module's mode is restored."""
    # Module by module, since some may be frozen in evaluation mode while the rest trains.
    before = {part: part.training for part in net.modules()}
    try:
        with torch.no_grad():
            net.eval()
            yield
    finally:
        for part, training in before.items():
            part.training = training


def _reduction(net: nn.Module) -> int:
    return int(getattr(net, "reduction", 1))


def _sizes(net: nn.Module, shape: tuple[int, int, int]) -> dict[int, Any]:
    step = _reduction(net)
    for side in shape[1:]:
        if side % step:
            raise SchemeError(f"export: pictures of {shape[1]} x {shape[2]}, and sizes vary in multiples of {step}.")
    dims = (torch.export.Dim(name, min=1) for name in ("h", "w"))
    # A multiple of a free dimension tells torch.export that a side divides evenly.
    return {axis: step * dim if step > 1 else dim for axis, dim in zip((2, 3), dims, strict=True)}


def _traced(net: nn.Module, x: Tensor, dims: Mapping[int, Any]) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(net, (x,), dynamic_shapes=(dims,))
    except Exception as e:  # whatever the tracer meets in a network
        said = " ".join(str(e).split())[:200]
        remedy = "Give one size: without dynamic_size." if len(dims) > 1 else "torch.export shows where."
        raise SchemeError(f"{type(net).__name__} cannot be traced: {said}\n  {remedy}") from None


def _pt2(program: Any, path: Path, notes: str) -> Callable[[Tensor], Tensor]:
    """Writes the file, and returns a function that runs it."""
    torch.export.save(program, path, extra_files={NOTES: notes})
    with warnings.catch_warnings():
        # torch 2.11 loads its own file into a read-only buffer, and warns about that.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        # Loaded from the file, so that the check covers what was written.
        return torch.export.load(path).module()


def _onnx(program: Any, path: Path, notes: str) -> Callable[[Tensor], Tensor]:
    """Writes the file, and returns a function that runs it on the CPU."""
    import onnx
    import onnxruntime

    with warnings.catch_warnings(), _silent("torch.onnx._internal.exporter._registration"):
        warnings.simplefilter("ignore")  # warnings about the exporter's own internals
        names: dict[str, Any] = {"input_names": ["pictures"], "output_names": ["logits"]}
        done = torch.onnx.export(program.run_decompositions(), (), dynamo=True, verbose=False, **names)
    assert done is not None
    # One self-contained file; the exporter would put large weights into a second one.
    done.save(path, external_data=False)
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"odenets": notes})
    onnx.save(model, path)
    # Always on the CPU: the check needs no other device, and others round differently.
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["logits"], {"pictures": x.cpu().numpy()})[0])


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Silences a logger's warnings: the exporter names each package that it supports but does not find."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _outputs(net: nn.Module, run: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> list[Tensor]:
    found = []
    for x in batches:
        try:
            with torch.no_grad():
                found.append(run(x))
        except Exception as e:  # a size that the trace took to be fixed
            said = " ".join(str(e).split())[:200]
            raise SchemeError(
                f"{type(net).__name__} as a file takes no pictures {tuple(x.shape)}, and the network does: {said}\n"
                "  Give one size: without dynamic_size."
            ) from None
    return found


def _difference(net: nn.Module, kind: str, got: list[Tensor], wanted: list[Tensor], tolerance: float) -> float:
    worst, scale = 0.0, 1.0
    for a, b in zip(got, wanted, strict=True):
        # Of each batch alone: a comparison with NaN is false, so a maximum over all would forget it.
        worst, scale = max(worst, _worst(net, kind, a.cpu().double(), b.cpu().double())), max(scale, _largest(b))
    difference = worst / scale
    if not difference <= tolerance:
        raise SchemeError(
            f"{type(net).__name__} as {kind}: its outputs differ by {difference:.2g} from the network's, more than "
            f"{tolerance:g}; nothing was written\n  Give a larger tolerance if that is expected, as in half precision."
        )
    return difference


def _worst(net: nn.Module, kind: str, a: Tensor, b: Tensor) -> float:
    """Returns the largest difference of finite outputs; shapes, and all that is not finite, must be equal."""
    if a.shape != b.shape:
        raise SchemeError(
            f"{type(net).__name__} as {kind}: its outputs are {tuple(a.shape)}, the network's {tuple(b.shape)}; "
            "nothing was written\n  Let its forward return one tensor whose shape follows from the picture's."
        )
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        raise SchemeError(
            f"{type(net).__name__} as {kind}: other outputs are infinite or NaN than the network's; nothing was written"
            "\n  Export a network whose outputs are finite."
        )
    return float((a - b)[finite].abs().max()) if finite.any() else 0.0


def _largest(y: Tensor) -> float:
    """Returns the largest magnitude of the finite numbers, 0 where there are none."""
    found = y[y.isfinite()]
    return float(found.abs().max()) if found.numel() else 0.0
