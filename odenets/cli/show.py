"""`odenets show SCHEME`: one scheme, by its array or its updates, with its order, stability and source."""

import inspect
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import schemes
from schemes import SchemeError, stability
from schemes.formulas import formulas
from schemes.order import order
from schemes.reversible import Reversible
from schemes.scheme import Scheme
from schemes.tableau import show as exact

from .. import plots
from ..messages import closed_output, counted, fail
from . import words as w
from .schemes import known_of

TEXT = """Shows one scheme, by a name or an expression such as nested(midpoint, rk4): its Butcher array as books print
it, in exact numbers, or the updates of a step; order, stability, mixing, source. Streams are x0, x1, ..., residual
functions F0, F1, ..., each update sees the result of those above it. --plot draws where |R(z)| <= 1.

Exit status: 0; 2 if there is no such scheme, or it has no stability function to plot."""
ENDINGS = (".png", ".svg", ".pdf")
LARGEST = 24  # stages up to which the order of a composed method is computed


def parser() -> w.Parser:
    """The options."""
    found = w.Parser(prog="odenets show", description=TEXT)
    found.add_argument("scheme", metavar="SCHEME", help="a name or an expression")
    found.add_argument("--plot", type=Path, metavar="FILE", help="draw the stability region: .png, .svg or .pdf")
    found.add_argument("--json", action="store_true", help="print JSON")
    return found


def run(args: Sequence[str]) -> None:
    """Runs one command line; errors that the user can fix end in two lines."""
    options = parser().parse(args)
    try:
        scheme = schemes.get(options.scheme)
        # Drawn first: if that fails, nothing has been printed yet.
        if options.plot is not None:
            _plot(scheme, options.plot)
        if options.json:
            w.write(w.as_json(described(scheme)), None)
        else:
            _print(scheme)
        # With --json the output is JSON and nothing else.
        if options.plot is not None and not options.json:
            print(f"plot: {options.plot}")
    except BrokenPipeError:
        closed_output()
    except SchemeError as e:
        fail(str(e), "odenets schemes lists them all")


def _plot(scheme: Scheme, path: Path) -> None:
    if path.suffix.lower() not in ENDINGS:
        raise SchemeError(f"--plot {path}: want a name that ends in {', '.join(ENDINGS)}")
    if scheme.tableau is None:
        raise SchemeError(
            f"{scheme} has no stability function to plot\n  Regions are those of Runge-Kutta methods, such as rk4."
        )
    try:
        plots.stability_regions({str(scheme): scheme.tableau}, path)
    except OSError as e:
        raise SchemeError(f"{path} cannot be written: {e.strerror or e}\n  Give another file.") from None


def described(scheme: Scheme) -> dict[str, Any]:
    """Returns all that is known of a scheme as plain values; numbers of the array are exact, as text."""
    found = {**known_of(str(scheme)), "streams": scheme.streams, "span": scheme.span, "gain": scheme.gain}
    # From step 1, which represents all later ones: the first step may be another method.
    found["amplification"] = _training(scheme, 1).amplification if scheme.reversible_in_training else None
    tableau = scheme.tableau
    if tableau is not None:
        b_hat = None if tableau.b_hat is None else list(map(exact, tableau.b_hat))
        found["array"] = {
            "a": [list(map(exact, row)) for row in tableau.a],
            "b": list(map(exact, tableau.b)),
            "c": list(map(exact, tableau.c)),
            "b_hat": b_hat,
            "exact": tableau.exact,
        }
        if found["order"] is None and tableau.stages <= LARGEST:
            found["order"] = order(tableau)
        found["companion_order"] = tableau.order_hat
        found["stability"] = {
            "polynomial": list(map(exact, stability.polynomial(tableau))),
            "real": stability.real_interval(tableau),
            "imaginary": stability.imaginary_interval(tableau),
        }
    else:
        if isinstance(scheme, Reversible) and scheme.base.tableau is not None:
            found["stability"] = scheme.stability_interval()._asdict()
        found["updates"] = {title: list(lines) for title, lines in updates(scheme)}
    return found


def updates(scheme: Scheme) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields titled lists of updates: one, or one for the first step and one for the others; also those in training."""
    if len(scheme.plan) == 1:  # the parts of a mix are shown by their own names
        yield from _two_steps(scheme.at(0), scheme.at(1), "")
    if scheme.training_differs:
        yield from _two_steps(_training(scheme, 0), _training(scheme, 1), " in training, for one draw")


def _two_steps(first: Scheme, second: Scheme, when: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    lines = formulas(first, second)
    if lines[0] == lines[1]:
        lines = lines[:1]
    titles = ("step",) if len(lines) == 1 else ("first step", "other steps")
    for title, found in zip(titles, lines, strict=True):
        if found:
            yield title + when, found


def _training(scheme: Scheme, n: int) -> Scheme:
    """Returns the training scheme of step n of a scheme, for one sample."""
    # A generator of its own, so that showing a scheme draws nothing from others.
    return scheme.training_scheme(n, torch.zeros(1, 1), torch.Generator().manual_seed(0))


def _print(scheme: Scheme) -> None:
    found = described(scheme)
    tableau = scheme.tableau
    print(found["scheme"])
    if tableau is not None:
        print("", *_array(str(tableau)), "", sep="\n")
    else:
        print(f"\n{(inspect.getdoc(type(scheme)) or '').splitlines()[0]}\n")
        for title, lines in found["updates"].items():
            print(f"{title}:", *(f"  {line}" for line in lines), sep="\n")
        if found["updates"]:
            print()
    w.facts(_facts(found))


def _array(text: str) -> Iterator[str]:
    """Yields an array's lines, long ones broken as `Tableau.parse` reads them: one without a bar continues a row."""
    for line in text.splitlines():
        indent = " " * (line.index("|") + 2)
        yield from textwrap.wrap(
            line, max(20, w.width() or len(line)), subsequent_indent=indent, break_long_words=False
        )


def _facts(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    companion = found.get("companion_order")
    yield "order", w.dash(found["order"]) + (f", companion {companion}" if companion else "")
    calls = found["calls"]
    called = "any number of calls" if calls is None else counted(calls, "call")
    yield "cost", f"{counted(found['stages'], 'residual function')} a step, {called}"
    if found["span"] != 1:
        yield "time", f"a step moves it on by {found['span']} h, which is the step of the array"
    if found["streams"] > 1:
        yield "streams", str(found["streams"])
    inverse = {"yes": "yes", "training": "of the training pass", None: "no"}[found["inverse"]]
    grows = found["amplification"]
    yield "inverse", inverse + (f"; a step back amplifies errors by {grows:.4g}" if grows is not None else "")
    if (limits := found.get("stability")) is not None:
        real, imaginary = (f"{limits[axis]:.4g}" for axis in ("real", "imaginary"))
        across = f"[-{imaginary} i, {imaginary} i]" if limits["imaginary"] else "0 alone"
        yield "stability", f"[-{real}, 0] on the real axis, {across} on the imaginary one"
        # Longer polynomials fill lines without being of use; JSON has them.
        if len(limits.get("polynomial", ())) in range(1, 10):
            yield "R(z)", _polynomial(limits["polynomial"])
    if found["mixing"] is not None:
        yield "mixing", f"{found['mixing']:.4g}, gain {found['gain']:.4g}"
    if "array" in found and not found["array"]["exact"]:
        yield "data", "rounded decimals, as published"
    if found["source"]:
        yield "source", found["source"]


def _polynomial(coefficients: Sequence[str]) -> str:
    terms = []
    for k, c in enumerate(coefficients):
        if c != "0":
            power = "" if k == 0 else "z" if k == 1 else f"z^{k}"
            terms.append(power if c == "1" and power else f"{c} {power}".strip())
    return " + ".join(terms).replace("+ -", "- ")
