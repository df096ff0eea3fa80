"""The error of every command that fails, in two lines: what was given and expected, and the remedy."""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .names import closest

TIP = "lightning fit --help lists every option, lightning fit -c FILE --print_config shows what is set"


class Failed(SystemExit):
    """Ends a command.

    Attributes:
        message: the first line that was printed, without "error: ".
    """

    def __init__(self, status: int, message: str):
        super().__init__(status)
        self.message = message


def fail(message: str, tip: str = "lightning --help shows how the command is used", status: int = 2) -> NoReturn:
    """Prints an error of exactly two lines and exits.

    Args:
        message: its first line names the cause; the rest is the remedy.
        tip: the second line if the message has only one.
        status: exit status.
    """
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    rest = " ".join(lines[1:]) or tip
    first = lines[0] if lines else "unknown"
    sys.stderr.write(f"error: {first}\n  {rest}\n")
    raise Failed(status, first)


def closed_output() -> None:
    """Discards what is left to flush once the reader has closed the pipe, as in `| head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def first_line(error: BaseException, most: int = 200) -> str:
    r"""Returns an exception's message, cut to fit into another message: its first line, or the name of its class.

    Args:
        error: The exception; many have a message of several lines, some have none.
        most: Number of characters kept.

    Example:
        >>> first_line(ValueError("no such file\n  give another")), first_line(EOFError())
        ('no such file', 'EOFError')
    """
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__


def counted(number: int, one: str) -> str:
    """Returns a number with its noun.

    Args:
        number: how many.
        one: the noun in the singular.

    Example:
        >>> counted(1, "call"), counted(4, "call")
        ('1 call', '4 calls')
    """
    return f"{number} {one}{'' if number == 1 else 's'}"


def explain(message: str, args: Sequence[str], options: Iterable[str]) -> tuple[str, str]:
    """Returns two lines for a parser's message.

    Args:
        message: The parser's message, of up to a dozen lines.
        args: The command line, for the full name of the key at fault and the files that it names.
        options: The parser's own option names.
    """
    # By patterns, since parsers report nothing but text, and argparse and jsonargparse word the same fault differently.
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip()]
    text = " ".join(lines)
    if found := re.search(r"Option '([^']+)' is not accepted", text):
        # The option belongs to a class that the command line names, so the class's own options are the candidates.
        return _unknown(found[1], args, _accepted(args))
    if found := re.search(r"(?:does not accept option '|unrecognized arguments: -*)([^'\s=]+)", text):
        return _unknown(found[1], args, options)
    if found := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", text):
        choices = re.findall(r"[\w-]+", found[2])
        return f"there is no {found[1]!r}; wanted one of {', '.join(choices)}", _closest(found[1], choices)
    if "arguments are required" in text:
        keys = " and ".join(re.findall(r"\.(\w+)", text))
        return f"{keys or text} not given", "A configuration file gives them: -c experiments/quickstart.yaml"
    if found := re.search(r'Parser key "([^"]+)"', text):
        return _bad_value(_full_key(found[1], args), lines, text, args)
    return text, TIP


def _unknown(key: str, args: Sequence[str], names: Iterable[str]) -> tuple[str, str]:
    return f"{_full_key(key, args)}: there is no such option", _closest(key, names)


def _bad_value(key: str, lines: list[str], text: str, args: Sequence[str]) -> tuple[str, str]:
    if found := re.search(r"File does not exist: '([^']*)'", text):
        path = Path(found[1])
        near = [str(p) for p in sorted(path.parent.glob("*.yaml")) or sorted(Path("experiments").glob("*.yaml"))]
        return f"{key}: there is no file {str(path)!r}", _closest(str(path), near)
    # jsonargparse ends its message with the value.
    given = re.search(r"(?:Got value|Given value|import path string): (.+)$", lines[-1])
    value = given[1] if given else "?"
    if "import path" in text or "has no attribute" in text or "Import of" in text or "No module named" in text:
        names = [*_class_paths(args), "odenets.models.HOResNet", "odenets.models.ResNet"]
        remedy = _closest(value, names) if given else TIP
        return f"{key}: {value if given else lines[-1]!r} cannot be imported; wanted the path of a class", remedy
    # A union fails once for each member, and several members may expect the same.
    wanted = list(dict.fromkeys(re.findall(r"Expected an? (.+?)(?=\. Got value|$)", "\n".join(lines), re.M)))
    choices = [c for w in wanted for c in re.findall(r"'([^']+)'|\b(\d+)\b", w) if w.startswith("typing.Literal")]
    flat = list(dict.fromkeys(a or b for a, b in choices))
    kinds = [re.sub(r"<class '([\w.]+)'>", r"\1", w) for w in wanted if not w.startswith("typing.Literal")]
    # null would be accepted too, but a wrong value was not meant as no value.
    kinds = [kind for kind in kinds if kind != "NoneType"]
    listed = " or ".join([*(["one of " + ", ".join(flat)] if flat else []), *kinds]) or " ".join(lines[1:])
    # Cut, since a value may be a whole mapping and a union may have many members: two lines must stay two.
    return f"{key}: got {value[:200]!r}, wanted {listed[:600]}", _closest(value, flat)


def _closest(name: str, names: Iterable[str]) -> str:
    names = list(dict.fromkeys(names))
    near = closest(name, names, cutoff=0.6)
    if not near:  # `max_epoch` is meant for `trainer.max_epochs`, `HoResNet` for `odenets.models.HOResNet`
        tails = {n.rpartition(".")[2]: n for n in names}
        near = [tails[t] for t in closest(name.rpartition(".")[2], tails, cutoff=0.6)]
    return f"Closest: {', '.join(near)}" if near else TIP


def _full_key(key: str, args: Sequence[str]) -> str:
    """Returns `model.net.scheme` for `scheme` if the command line has it, otherwise the key itself."""
    for arg in args:
        option = arg.partition("=")[0].lstrip("-")
        if arg.startswith("--") and (option == key or option.endswith("." + key)):
            return option
    return key


def _class_paths(args: Sequence[str]) -> Iterator[str]:
    """Yields import paths of classes that the command line or its configuration files name."""
    files = [Path(arg) for arg in args if arg.endswith((".yaml", ".yml")) and Path(arg).is_file()]
    # Read for hints only, so a file in another encoding must not fail here.
    texts = [*args, *(file.read_text(errors="ignore") for file in files)]
    for text in texts:
        yield from re.findall(r"\b[A-Za-z_]\w*(?:\.\w+)+\.[A-Z]\w*", text)


def _accepted(args: Sequence[str]) -> Iterator[str]:
    """Yields the argument names of those classes."""
    for path in dict.fromkeys(_class_paths(args)):
        module, _, name = path.rpartition(".")
        try:
            found: Any = getattr(importlib.import_module(module), name)
            yield from inspect.signature(found).parameters
        except (ImportError, AttributeError, TypeError, ValueError):
            continue  # only a hint is lost
