"""Checks of configuration files: what a YAML parser would silently accept, or choke on, becomes a two-line error."""

import re
import sys
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from schemes import SchemeError

from .messages import first_line

MOST_NODES = 100_000  # of a file with its aliases expanded; a large experiment has some hundreds
DEEPEST = 100  # levels
LARGEST = 10 << 20  # bytes
MODE = "odenets"  # the parser mode of `CheckedParser`
# Numbers that YAML 1.1 reads in base 8 or 60: 010 is 8, and 1:30 is 90.
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
OTHER_BASES = re.compile(r"[-+]?0[0-7_]*[0-7][0-7_]*|[-+]?\d[\d_]*(:[0-5]?\d)+(\.\d*)?")


def check_files(words: Sequence[str]) -> None:
    """Checks every YAML file that a command line names.

    Args:
        words: the command line.

    Raises:
        SchemeError: a file that is not UTF-8, or has a tab as indentation, a key twice in one mapping, numbers in bases
            8 or 60, or aliases that would exhaust memory.
    """
    # Any word may name a file: options of a subcommand take configurations of their own.
    values = [word.partition("=")[2] if word.startswith("--") and "=" in word else word for word in words]
    configs = {words[i + 1] for i, word in enumerate(words[:-1]) if word in ("-c", "--config")}
    # `-cFILE`, `-c=FILE` and `--config=FILE` mean the same.
    configs |= {found[1] for word in words if (found := re.match(r"(?:-c=?|--config=)([^=].*)", word, re.S))}
    for value in dict.fromkeys([*values, *configs]):
        if value in configs or value.lower().endswith((".yaml", ".yml")):
            path = Path(value)
            try:
                found = path.is_file()
            # A word that is not a path at all, for example with a null byte or thousands of characters.
            except (OSError, ValueError):
                continue
            if found:
                check_file(path)


class CheckedParser:
    """A base of jsonargparse's parsers that checks all YAML as ``check_files`` does: in files that a file names too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("parser_mode", _checked_mode())
        super().__init__(*args, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **kwargs: Any) -> Any:
        """As jsonargparse's; refuses an option's number in base 8 or 60."""
        found = super().parse_args(args, *more, **kwargs)  # type: ignore[misc]
        _check_options(sys.argv[1:] if args is None else args, found)
        return found


def refusal(error: BaseException | None) -> SchemeError | None:
    """Returns the first error of ours that led to a parser's: the parser's own message would bury it.

    Args:
        error: what the parser was given.
    """
    while error is not None and not isinstance(error, SchemeError):
        error = error.__cause__ or error.__context__
    return error


def _checked_mode() -> str:
    """The name of a mode of parsing whose YAML is checked."""
    import yaml
    from jsonargparse import get_loader, set_loader

    usual = get_loader("yaml")

    def load(text: str, path: Any = "") -> Any:
        found = usual(text)
        if isinstance(found, list | dict):
            node = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            _walk(node, path or "the configuration", {}, [])
        return found

    # A mode of its own: the parsers of other packages in this process stay as they are.
    set_loader(MODE, load, (yaml.YAMLError,))
    return MODE


def _check_options(words: Sequence[str], config: Any) -> None:
    """Refuses options whose numbers were read in base 8 or 60; a text such as the 1:30:00 of a duration stays one."""
    import yaml

    for word, after in zip_longest(words, words[1:], fillvalue=""):
        key, equals, text = word.removeprefix("--").partition("=")
        text = text if equals else after
        if not word.startswith("--") or not OTHER_BASES.fullmatch(text):
            continue
        number, base = yaml.safe_load(text), 60 if ":" in text else 8
        names = {name.replace("init_args.", ""): value for name, value in flat(config.as_dict()).items()}
        read = [value for name, value in names.items() if f".{name}".endswith(f".{key}")]
        if any(type(value) in (int, float) and value == number for value in read):
            raise SchemeError(f"--{key}: YAML reads {text} in base {base}\n  Write the number in base 10.")


def check_file(path: Path) -> None:
    """Checks one YAML file; see ``check_files``."""
    import yaml

    if path.stat().st_size > LARGEST:
        raise SchemeError(f"{path} has {path.stat().st_size:,} bytes\n  A configuration has a few thousand.")
    text = _text(path)
    try:
        # Composed and not loaded, since duplicate keys and aliases are gone once dictionaries are built.
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(e, "problem", None) or first_line(e)
        remedy = "Every [ and { wants its end, every key a colon and a space."
        if "\\t" in str(problem) or _has_tab(text, mark):
            problem, remedy = "a tab, which YAML does not allow as indentation", "Use spaces."
        raise SchemeError(f"parsing {path}{place}: {problem}\n  {remedy}") from None
    except RecursionError:
        raise SchemeError(f"{path} is nested too deeply\n  A configuration has some ten levels.") from None
    if node is not None:
        _walk(node, path, {}, [])


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        raise SchemeError(
            f"{path}, line {line}: byte {data[e.start]:#04x} is no UTF-8\n  Save the file as UTF-8."
        ) from None


def _has_tab(text: str, mark: Any) -> bool:
    lines = text.splitlines()
    return mark is not None and mark.line < len(lines) and lines[mark.line].lstrip(" ").startswith("\t")


def _walk(node: Any, path: Path | str, sizes: dict[int, int], above: list[int]) -> int:
    """Returns the number of values below a node with aliases expanded; raises for faults such as a duplicate key."""
    if id(node) in above:
        raise SchemeError(f"{path}, line {node.start_mark.line + 1}: an alias of something that it is a part of")
    # Counted once, however often an alias refers to it: the count must not itself take the time that it guards against.
    if id(node) in sizes:
        return sizes[id(node)]
    if len(above) > DEEPEST:
        raise SchemeError(f"{path} is nested too deeply\n  A configuration has some ten levels.")
    if node.tag in NUMBERS and not node.style and OTHER_BASES.fullmatch(node.value):
        base = 60 if ":" in node.value else 8
        raise SchemeError(
            f"{path}, line {node.start_mark.line + 1}: YAML reads {node.value} in base {base}\n"
            "  Write the number in base 10, or a text in quotes."
        )
    below = node.value if isinstance(node.value, list) else []
    if below and isinstance(below[0], tuple):
        _check_keys(below, path)
        below = [part for pair in below for part in pair]
    size = 1 + sum(_walk(part, path, sizes, [*above, id(node)]) for part in below)
    if size > MOST_NODES:
        raise SchemeError(
            f"{path}, line {node.start_mark.line + 1}: its aliases stand for more than {MOST_NODES:,} values\n"
            "  Write out what is meant."
        )
    sizes[id(node)] = size
    return size


def _check_keys(pairs: Sequence[tuple[Any, Any]], path: Path | str) -> None:
    seen: dict[Any, int] = {}
    for key, _ in pairs:
        line = key.start_mark.line + 1
        # A merge key may occur several times.
        if not isinstance(key.value, str) or key.value == "<<":
            continue
        if key.value in seen:
            raise SchemeError(
                f"{path}: the key {key.value!r} stands twice, in lines {seen[key.value]} and {line}\n"
                "  Keep one of them: YAML would take the second and drop the first."
            )
        seen[key.value] = line


def flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Returns the values of a nested configuration by dotted names.

    Example:
        >>> flat({"a": {"b": 1, "c": [2, {"d": 3}]}})
        {'a.b': 1, 'a.c.0': 2, 'a.c.1.d': 3}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{above}{key}"
        if isinstance(value, list | tuple):
            value = dict(enumerate(value))
        if isinstance(value, Mapping) and value:
            found.update(flat(value, f"{name}."))
        else:
            found[name] = value
    return found
