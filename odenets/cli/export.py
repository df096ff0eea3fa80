"""`odenets export`: the network of a checkpoint as a file that runs without this package."""

from collections.abc import Sequence
from pathlib import Path

from schemes import SchemeError

from ..export import Format, export
from ..messages import fail
from ..training.sources import DataError
from ..training.trained import open_trained
from . import words as w

TEXT = """Writes the network of a checkpoint as ONNX or as torch.export's .pt2. The input, `pictures` (n, c, h, w), must
be normalised: the file's metadata hold mean and std, how pictures are cropped, and the names of the classes. The file
is opened again and compared with the network, on batches of other sizes.

Exit status: 0; 2 if nothing was written."""


def parser() -> w.Parser:
    """The options."""
    found = w.Parser(prog="odenets export", description=TEXT)
    found.add_argument("checkpoint", metavar="CKPT", help="checkpoint of a run")
    found.add_argument("--output", type=Path, required=True, metavar="FILE", help="the file to write")
    found.add_argument("--format", choices=("onnx", "pt2"), help="default: by the suffix of FILE")
    found.add_argument("--size", type=w.positive, help="side of the pictures; default: that of training")
    found.add_argument("--dynamic_size", action="store_true", help="let height and width vary")
    found.add_argument("--tolerance", type=w.share, default=1e-5, help="largest relative difference of logits (1e-5)")
    found.add_argument("--json", action="store_true", help="print what was written as JSON")
    return found


def run(args: Sequence[str]) -> None:
    """Runs one command line; errors that the user can fix end in two lines and exit status 2."""
    options = parser().parse(args)
    try:
        _run(options.checkpoint, options.output, options.format, options)
    except ImportError as e:
        # The message about a missing extra reads "who needs what: how it is installed".
        cause, _, remedy = str(e).partition(": ")
        fail(cause, remedy)
    except (SchemeError, DataError) as e:
        fail(str(e), "odenets export --help shows how it is used")


def _run(checkpoint: str, output: Path, form: Format | None, options: w.argparse.Namespace) -> None:
    trained = open_trained(checkpoint)
    view = trained.view
    if options.size is not None:
        view = view._replace(height=options.size, width=options.size)
    notes = {"classes": trained.classes, "picture": view.state(), "step": trained.step}
    done = export(
        *(trained.net, output, (view.channels, view.height, view.width), form),
        dynamic_size=options.dynamic_size,
        tolerance=options.tolerance,
        notes=notes,
    )
    if options.json:
        w.write(w.as_json({**done._asdict(), "path": str(done.path), "bytes": done.path.stat().st_size}), None)
    else:
        shape = ", ".join(map(str, done.shape))
        print(f"{done.path}: {done.format}, pictures ({shape}), logits within {done.difference:.1g} of the network's")
