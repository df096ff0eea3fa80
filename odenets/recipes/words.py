"""Recipes on a command line: ``-c recipe:NAME`` in place of a file."""

from collections.abc import Sequence

from .table import find

PREFIX = "recipe:"
OPTIONS = ("-c", "--config")


def written_out(words: Sequence[str]) -> list[str]:
    """Returns a command line with each ``recipe:NAME`` in place of a configuration replaced by its text.

    The parser accepts the text of a configuration wherever it accepts a file name.

    Args:
        words: the command line.

    Raises:
        SchemeError: an unknown recipe; the closest names are listed.

    Example:
        >>> words = written_out(["fit", "-c", "recipe:rdnet_tiny", "--data.root", "x"])
        >>> words[2].splitlines()[0]
        '# lightning fit -c recipe:rdnet_tiny --data.root FOLDER'
    """
    found: list[str] = []
    for word in words:
        option, equals, value = word.partition("=")
        if found and found[-1] in OPTIONS and word.startswith(PREFIX):
            word = find(word.removeprefix(PREFIX)).text
        elif option in OPTIONS and equals and value.startswith(PREFIX):
            word = f"{option}={find(value.removeprefix(PREFIX)).text}"
        found.append(word)
    return found
