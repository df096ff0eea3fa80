"""What tests of commands share: a command line in this process, its answer, and the two lines of a failure."""

import pytest

from odenets.cli import main


def answer(capsys, *args: str, status: int = 0) -> tuple[str, str]:
    """Standard output and standard error of a command line that ends with this status."""
    if status:
        with pytest.raises(SystemExit) as e:
            main(list(args))
        assert e.value.code == status
    else:
        main(list(args))
    return capsys.readouterr()


def fails(capsys, *args: str, status: int = 2) -> str:
    """The two lines of a failure, joined."""
    out, err = answer(capsys, *args, status=status)
    lines = err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("error: ") and not out, (out, lines)
    return " ".join(lines)
