"""One line per trained network in an SQLite file, written as soon as it is known."""

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from schemes import SchemeError

from .space import Candidate


@dataclass(frozen=True)
class Result:
    """What training one network gave.

    Attributes:
        status: "trained", "diverged" (the loss became no number), or "failed".
        accuracy: share of validation pictures whose class came first.
        loss: mean cross-entropy on them.
        train_loss: mean cross-entropy of the last epoch.
        seconds: of training.
        kept_mib: what a training step keeps for its backward pass, in MiB.
        ranks: (width, numerical rank, effective rank) of the features after the stem and after every step.
        error: the last line of what went wrong.
        worker: machine and process.
    """

    status: str
    accuracy: float | None = None
    loss: float | None = None
    train_loss: float | None = None
    seconds: float | None = None
    kept_mib: float | None = None
    ranks: list[tuple[int, int, float]] = field(default_factory=list)
    error: str = ""
    worker: str = ""


_TYPES = {int: "INTEGER", float: "REAL", str: "TEXT"}
_EXAMPLE = {**asdict(Candidate(0, "", "pre", 0, 0, 0, 0, "relu", "batch")), **asdict(Result(""))}
COLUMNS = tuple(_EXAMPLE)


class Store:
    """The results of a study in an SQLite file, one line per network; a context manager.

    One process writes: the one that hands out the work. Each line is its own transaction, so that whatever stops the
    process, what was recorded stays; a network is recorded once, or the database refuses.

    Args:
        path: the file; made where there is none.
        settings: what determines the results. A file that holds networks of others is refused.

    Raises:
        SchemeError: other settings, another process that writes, or a file that is no such database.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]):
        self.path, self.settings = Path(path), dict(settings)

    def __enter__(self) -> "Store":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(f"{self.path}.lock")
        try:
            # At once or not at all: a second driver would train the same networks.
            self.lock.acquire(timeout=0)
        except Timeout:
            raise SchemeError(
                f"another process writes to {self.path}; wait for it, or give this study a file of its own."
            ) from None
        try:
            self.connection = sqlite3.connect(self.path)
            self._begin()
        except BaseException:
            self.lock.release()
            raise
        return self

    def _begin(self) -> None:
        # Every name in these statements is a field of the two classes above.
        columns = ", ".join(
            f'"{name}" {"INTEGER PRIMARY KEY" if name == "number" else _TYPES.get(type(value), "")}'
            for name, value in _EXAMPLE.items()
        )
        try:
            with self.connection:
                self.connection.execute("BEGIN IMMEDIATE")  # Python begins no transaction for a CREATE
                self.connection.execute("CREATE TABLE IF NOT EXISTS study (settings TEXT)")
                self.connection.execute(f"CREATE TABLE IF NOT EXISTS networks ({columns})")
                found = self.connection.execute("SELECT settings FROM study").fetchone()
                # The first process writes the settings, inside the transaction in which it looked for them.
                if found is None:
                    self.connection.execute("INSERT INTO study VALUES (?)", (json.dumps(self.settings),))
        except sqlite3.DatabaseError as error:
            raise SchemeError(f"{self.path} is no file of a study: {error}.") from None
        if found is not None:
            # Both through JSON, which makes lists of tuples.
            old, new = json.loads(found[0]), json.loads(json.dumps(self.settings))
            other = [
                f"{k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in {**old, **new} if old.get(k) != new.get(k)
            ]
            if other and not self.done():  # nothing was trained under them yet
                with self.connection:
                    self.connection.execute("UPDATE study SET settings = ?", (json.dumps(self.settings),))
            elif other:
                raise SchemeError(
                    f"{self.path} was begun with other settings ({'; '.join(other)});\n"
                    "  go on with the same ones, or give this study a file of its own."
                )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.connection.close()
        self.lock.release()

    def done(self) -> set[int]:
        """Numbers of the networks that are recorded."""
        return {number for (number,) in self.connection.execute("SELECT number FROM networks")}

    def add(self, candidate: Candidate, result: Result) -> None:
        """Records one network.

        Raises:
            sqlite3.IntegrityError: it is recorded already.
        """
        line = {**asdict(candidate), **asdict(result), "ranks": json.dumps(result.ranks)}
        with self.connection:
            self.connection.execute(
                f"INSERT INTO networks VALUES ({', '.join('?' * len(COLUMNS))})",
                [line[name] for name in COLUMNS],
            )

    def failed(self) -> int:
        """Number of networks that failed."""
        return self.connection.execute("SELECT count(*) FROM networks WHERE status = 'failed'").fetchone()[0]

    def forget_failed(self) -> int:
        """Removes the lines of networks that failed, so that they are trained again; returns how many there were."""
        with self.connection:
            return self.connection.execute("DELETE FROM networks WHERE status = 'failed'").rowcount


def read(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A study's settings and its lines by number; also of one that is still running.

    Raises:
        SchemeError: no such file, or no study.
    """
    path = Path(path)
    if not path.is_file():
        raise SchemeError(f"there is no file {str(path)!r}; a study makes one: odenets study run -c FILE.yaml.")
    # Read-only, so that looking at a running study cannot lock its writer out.
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    connection.row_factory = sqlite3.Row
    try:
        settings = json.loads(connection.execute("SELECT settings FROM study").fetchone()[0])
        lines = [dict(row) for row in connection.execute("SELECT * FROM networks ORDER BY number")]
    except (sqlite3.DatabaseError, TypeError) as error:
        raise SchemeError(f"{path} is no file of a study: {error}.") from None
    finally:
        connection.close()
    for line in lines:
        line["ranks"] = json.loads(line["ranks"])
    return settings, lines
