"""The experiments that come with the package, by name: ``lightning fit -c quickstart`` needs no clone.

A wheel holds them beside this file, a clone in its own folder ``experiments/``; the files are the same.
"""

from collections.abc import Sequence
from pathlib import Path

from schemes import SchemeError

from .names import closest

CONFIG = ("-c", "--config")
ENDINGS = (".yaml", ".yml")
GROUPS = ("", "studies/")  # the folders of experiments, as they stand in a name


def folder() -> Path | None:
    """Where the experiments lie, or None for a package that somebody has put together without them."""
    here = Path(__file__).parent
    for place in (here / "experiments", here.parent / "experiments"):
        # By a file in it: beside an installed package lie the folders of others, and one may be called experiments.
        if (place / "quickstart.yaml").is_file():
            return place
    return None


def experiments() -> dict[str, Path]:
    """The files by the names that a command line takes.

    Example:
        >>> experiments()["quickstart"].name
        'quickstart.yaml'
    """
    place = folder()
    if place is None:
        return {}
    return {group + file.stem: file for group in GROUPS for file in sorted((place / group).glob("*.yaml"))}


def find(given: str) -> Path | None:
    """The experiment of that name, with or without ``experiments/`` and ``.yaml`` about it; None where there is none.

    Example:
        >>> find("experiments/quickstart.yaml") == find("quickstart")
        True
    """
    name = given.removeprefix("experiments/")
    for ending in ENDINGS:
        name = name.removesuffix(ending)
    return experiments().get(name)


def file_or_experiment(given: str) -> str:
    """A file as it was given, or else the experiment of that name.

    Raises:
        SchemeError: there is neither; the closest are named.
    """
    # What lies there under that very name comes first, so that nobody's own file is passed over.
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
    """A command line whose ``-c NAME`` are files.

    Raises:
        SchemeError: a name that is neither a file nor an experiment.
    """
    # Before any parser, as jsonargparse opens what stands behind --config by itself.
    found = list(words)
    for i, word in enumerate(words):
        if i and words[i - 1] in CONFIG and _may_be_name(word):
            found[i] = file_or_experiment(word)
        option, equals, value = word.partition("=")
        if equals and option in CONFIG and _may_be_name(value):
            found[i] = f"{option}={file_or_experiment(value)}"
    return found


def _may_be_name(text: str) -> bool:
    """Whether a word may be meant as a file's name: configurations may also be written out, as YAML or JSON."""
    # A NUL or a name that is too long is an error to the system, and not a file that is not there.
    return bool(text) and not any(c in text for c in "{}[]:\n\0") and len(text) < 4096
