"""The experiments that ship with the package, by name: ``lightning fit -c quickstart`` needs no clone.

A wheel holds them next to this file, a clone in its own folder ``experiments/``; the files are the same.
"""

from collections.abc import Sequence
from pathlib import Path

from schemes import SchemeError

from .names import closest

CONFIG = ("-c", "--config")
ENDINGS = (".yaml", ".yml")
GROUPS = ("", "studies/")  # the folders of experiments, as written in a name


def folder() -> Path | None:
    """Returns the folder of the experiments, or None for a package that was built without them."""
    here = Path(__file__).parent
    for place in (here / "experiments", here.parent / "experiments"):
        # Recognised by a file in it: an installed package has other packages next to it, which may have this name.
        if (place / "quickstart.yaml").is_file():
            return place
    return None


def experiments() -> dict[str, Path]:
    """Returns the files by the names that a command line accepts.

    Example:
        >>> experiments()["quickstart"].name
        'quickstart.yaml'
    """
    place = folder()
    if place is None:
        return {}
    return {group + file.stem: file for group in GROUPS for file in sorted((place / group).glob("*.yaml"))}


def find(given: str) -> Path | None:
    """Returns the experiment of that name, with or without ``experiments/`` and ``.yaml``; None if there is none.

    Example:
        >>> find("experiments/quickstart.yaml") == find("quickstart")
        True
    """
    name = given.removeprefix("experiments/")
    for ending in ENDINGS:
        name = name.removesuffix(ending)
    return experiments().get(name)


def file_or_experiment(given: str) -> str:
    """Returns a file as given, or else the experiment of that name.

    Raises:
        SchemeError: there is neither; the closest are named.
    """
    # An existing file of exactly that name comes first, so that a user's own file is never passed over.
    path = Path(given)
    if path.is_file():
        return given
    found = find(given)
    if found is not None:
        return str(found)
    known = list(experiments())
    beside = [str(p) for p in sorted(path.parent.glob("*.yaml"))]
    near = closest(given, beside, cutoff=0.6) or closest(path.stem, known, cutoff=0.5)
    hint = f"Closest: {', '.join(near)}. All: odenets experiments" if near else f"Experiments: {', '.join(known)}"
    raise SchemeError(f"config: there is no file {given!r}, and no experiment of that name\n  {hint}")


def with_files(words: Sequence[str]) -> list[str]:
    """Returns a command line in which every ``-c NAME`` is replaced by its file.

    Raises:
        SchemeError: a name that is neither a file nor an experiment.
    """
    # Before any parser runs, since jsonargparse itself opens the value of --config.
    found = list(words)
    for i, word in enumerate(words):
        if i and words[i - 1] in CONFIG and _may_be_name(word):
            found[i] = file_or_experiment(word)
        option, equals, value = word.partition("=")
        if equals and option in CONFIG and _may_be_name(value):
            found[i] = f"{option}={file_or_experiment(value)}"
    return found


def _may_be_name(text: str) -> bool:
    """Whether a word may be meant as a file name: configurations may also be written inline, as YAML or JSON."""
    # For a NUL or an overlong name the system raises an error instead of reporting a missing file.
    return bool(text) and not any(c in text for c in "{}[]:\n\0") and len(text) < 4096
