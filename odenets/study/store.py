"""One line per trained network in an SQLite file, written as soon as it is known."""

import json
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar, get_origin, get_type_hints

from schemes import SchemeError

from ..extras import MissingExtra, install
from ..messages import first_line
from .space import Candidate

try:
    from filelock import FileLock, Timeout
except ImportError:
    raise MissingExtra(f"studies need filelock: {install('study')}", name="filelock") from None

TRAINED = "trained"  # the one status whose figures may be averaged


@dataclass(frozen=True)
class Result:
    """What training one network gave.

    Attributes:
        status: "trained", "diverged" (the loss became no number), or "failed".
        accuracy: share of validation pictures whose class came first; None unless it was trained.
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


Task = TypeVar("Task")
Outcome = TypeVar("Outcome")
_TYPES = {int: "INTEGER", float: "REAL", str: "TEXT"}


@dataclass(frozen=True)
class Table(Generic[Task, Outcome]):
    """What the lines of a file hold: the fields of two dataclasses; lists and mappings are JSON.

    Attributes:
        name: of the table.
        task: what was trained.
        outcome: what that gave; has a field "status".
        key: the field of the task that tells it from all others.
    """

    name: str
    task: type[Task]
    outcome: type[Outcome]
    key: str

    @property
    def columns(self) -> list[str]:
        """Names, in order."""
        return [f.name for kind in (self.task, self.outcome) for f in fields(kind)]  # type: ignore[arg-type]

    @property
    def structured(self) -> list[str]:
        """The columns that are JSON."""
        return [name for name, hint in self._hints().items() if get_origin(hint) in (list, dict)]

    def _hints(self) -> dict[str, Any]:
        return {**get_type_hints(self.task), **get_type_hints(self.outcome)}

    @property
    def declared(self) -> str:
        """The columns as SQL."""
        hints = self._hints()
        # No type for what may be None or is JSON: SQLite then keeps the value as it comes.
        kinds = {name: _TYPES.get(hints[name], "") for name in self.columns}
        return ", ".join(f'"{n}" {k}{" PRIMARY KEY" if n == self.key else ""}' for n, k in kinds.items())


NETWORKS = Table("networks", Candidate, Result, "number")


class Store(Generic[Task, Outcome]):
    """The results of a study in an SQLite file, one line per network; a context manager.

    One process writes: the one that hands out the work. Each line is its own transaction, so that whatever stops the
    process, what was recorded stays; a network is recorded once, or the database refuses. Other processes may read at
    any time: where one is at it for long, the line waits for it, however long it takes, and a notice says so.

    Args:
        path: the file; where there is none it is made beside its place and renamed, so that what is there is whole.
        settings: what determines the results. A file that holds networks of others is refused.
        table: what the lines hold.
        growing: names of settings that may grow: lists in them are joined with those that are there, and mappings key
            by key; any other value in them stays as it is.
        check: raises a SchemeError for settings that cannot be, of what is there and what grows together.
        begun: whether networks have been trained in part, of which the file has no line yet.

    Raises:
        SchemeError: other settings, another process that writes, a place that cannot be written to, or a file that is
            no such database.
    """

    def __init__(
        self,
        path: str | Path,
        settings: Mapping[str, Any],
        table: Table[Task, Outcome] = NETWORKS,  # type: ignore[assignment]
        growing: tuple[str, ...] = (),
        check: Callable[[Mapping[str, Any]], None] | None = None,
        begun: Callable[[], bool] = lambda: False,
    ):
        self.path, self.settings, self.table, self.growing = Path(path), dict(settings), table, growing
        self.check, self.begun = check, begun

    def __enter__(self) -> "Store[Task, Outcome]":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(f"{self.path}.lock")
            # At once or not at all: a second driver would train the same networks.
            self.lock.acquire(timeout=0)
        except Timeout:
            raise SchemeError(
                f"another process writes to {self.path}; wait for it, or give this study a file of its own."
            ) from None
        except OSError as error:
            raise SchemeError(
                f"{self.path.parent} cannot be written to: {error.strerror or error}\n"
                "  Give a folder that can be: one that is there, or one that can be made."
            ) from None
        try:
            if not self.path.exists():
                self._make()
            self._begin()
        except BaseException:
            # `__exit__` is not called where `__enter__` raises, and the lock would stay with this process.
            if hasattr(self, "connection"):
                self.connection.close()
            self.lock.release()
            raise
        return self

    def _make(self) -> None:
        beside = self.path.with_name(f".{self.path.name}.part")
        beside.unlink(missing_ok=True)
        connection = sqlite3.connect(beside)
        with connection:
            connection.execute("CREATE TABLE study (settings TEXT)")
            connection.execute(f"CREATE TABLE {self.table.name} ({self.table.declared})")
            connection.execute("INSERT INTO study VALUES (?)", (json.dumps(self.settings),))
        connection.close()
        os.replace(beside, self.path)

    def _begin(self) -> None:
        check_file(self.path)
        # Without an isolation level no transaction is open between two statements. The timeout is short, as `patient`
        # waits.
        self.connection = sqlite3.connect(self.path, timeout=1, isolation_level=None)
        # Both through JSON, which makes lists of tuples.
        old, new = settings_of(self.connection, self.path, self.table), json.loads(json.dumps(self.settings))
        other = [text for name in {**old, **new} for text in self._other(name, old.get(name), new.get(name))]
        if other and (self.done() or self.begun()):
            raise SchemeError(
                f"{self.path} was begun with other settings ({'; '.join(other)});\n"
                "  go on with the same ones, or give this study a file of its own."
            )
        # Where nothing was trained under the old ones yet, they are forgotten, plan and all.
        for name in () if other else self.growing:
            new[name] = joined(old[name], new[name]) if name in old and name in new else old.get(name, new.get(name))
        if self.check is not None:
            self.check(new)
        if new != old:
            self._write("UPDATE study SET settings = ?", [json.dumps(new)])
        self.settings = new

    def _other(self, name: str, old: Any, new: Any) -> list[str]:
        if name not in self.growing:
            # As texts: to Python 1, 1.0 and True are equal, and to an option they are not.
            return [] if json.dumps(old) == json.dumps(new) else [f"{name}: {old!r} there, {new!r} now"]
        # What one of them lacks is what grows.
        found = [] if old is None or new is None else conflicts(old, new)
        return [f"{place}: {a} there, {b} now" for place, a, b in found]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.connection.close()
        self.lock.release()

    def _write(self, statement: str, values: list[Any]) -> int:
        """One statement as a transaction of its own; the number of lines that it changed."""
        return patient(lambda: self.connection.execute(statement, values).rowcount, self.path)

    def done(self) -> set[Any]:
        """Keys (numbers) of the networks that are recorded."""
        rows = patient(
            lambda: self.connection.execute(f'SELECT "{self.table.key}" FROM {self.table.name}').fetchall(), self.path
        )
        return {key for (key,) in rows}

    def add(self, task: Task, outcome: Outcome) -> None:
        """Records one network.

        Args:
            task: what was to be trained.
            outcome: what came of it.

        Raises:
            sqlite3.IntegrityError: it is recorded already.
        """
        line = {**asdict(task), **asdict(outcome)}  # type: ignore[call-overload]
        line |= {name: json.dumps(line[name]) for name in self.table.structured}
        columns = self.table.columns
        # By name: a file of a later version may have more of them.
        names = ", ".join(f'"{name}"' for name in columns)
        self._write(
            f"INSERT INTO {self.table.name} ({names}) VALUES ({', '.join('?' * len(columns))})",
            [line[name] for name in columns],
        )

    def failed(self) -> int:
        """Number of networks that failed."""
        statement = f"SELECT count(*) FROM {self.table.name} WHERE status = 'failed'"
        return patient(lambda: self.connection.execute(statement).fetchone()[0], self.path)

    def forget_failed(self, among: Collection[Any] | None = None) -> int:
        """Removes the lines of networks that failed, so that they are trained again; returns how many there were.

        Args:
            among: keys of those that would be trained again; None: of all.
        """
        statement = f"DELETE FROM {self.table.name} WHERE status = 'failed'"
        if among is None:
            return self._write(statement, [])
        # As one JSON text, since a statement takes a limited number of values.
        chosen = f'{statement} AND "{self.table.key}" IN (SELECT value FROM json_each(?))'
        return self._write(chosen, [json.dumps(list(among))])


Value = TypeVar("Value")


def patient(act: Callable[[], Value], path: Path) -> Value:
    """Does something with a database, again and again while another process has it locked.

    Args:
        act: fails as a whole, or succeeds.
        path: of the database, for the notice after five seconds.

    Raises:
        SchemeError: the database is damaged, or cannot be written to.
        sqlite3.IntegrityError: a line is there already.
    """
    began, said = time.monotonic(), False
    while True:
        try:
            return act()
        except sqlite3.IntegrityError:
            raise
        except sqlite3.DatabaseError as error:
            # Extended codes, such as SQLITE_BUSY_SNAPSHOT, have the plain one in their low byte.
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code == sqlite3.SQLITE_READONLY:
                raise
            if code == sqlite3.SQLITE_NOTADB:
                raise SchemeError(f"{path} is no file of a study: {first_line(error)}.") from None
            if code not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise SchemeError(
                    f"{path} cannot be read or written: {first_line(error)}\n"
                    "  See that the disk has room; where the file is damaged, bring back a copy, or remove it."
                ) from None
            if not said and time.monotonic() - began > 5:
                said = True
                print(f"{path} is in use by another process, such as a reader: waiting for it", file=sys.stderr)
            time.sleep(0.05)


def joined(old: Any, new: Any) -> Any:
    """Lists with what the second has and the first lacks at the end, mappings key by key; else the second.

    Args:
        old: what was read.
        new: what comes on top.
    """
    if isinstance(old, list) and isinstance(new, list):
        return [*old, *(value for value in new if value not in old)]
    if isinstance(old, dict) and isinstance(new, dict):
        return {**old, **{k: joined(old[k], v) if k in old else v for k, v in new.items()}}
    return new


def conflicts(old: Any, new: Any, place: str = "") -> list[tuple[str, Any, Any]]:
    """What ``joined`` would replace: values at one place that are not both lists or both mappings, and differ.

    Args:
        old: what was read.
        new: what comes on top.
        place: the keys above.

    Returns:
        For each its keys, the old and the new value.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        return [c for k in old if k in new for c in conflicts(old[k], new[k], f"{place}, {k}" if place else str(k))]
    both = isinstance(old, list) and isinstance(new, list)
    return [] if both or json.dumps(old) == json.dumps(new) else [(place, old, new)]


def check_file(path: Path) -> None:
    """Refuses an empty file: SQLite takes it for a new database, and a study would begin again in silence.

    Args:
        path: of the database.

    Raises:
        SchemeError: a file of no bytes, or no file.
    """
    if not path.is_file():
        raise SchemeError(f"{path} is no file of a study: it is a folder;\n  give another place, or move it away.")
    if path.stat().st_size == 0:
        raise SchemeError(
            f"{path} is no file of a study: it is empty, as after a full disk or a broken copy;\n"
            "  bring back a copy of it, or remove it to begin anew."
        )


def settings_of(connection: sqlite3.Connection, path: Path, table: Table[Any, Any]) -> dict[str, Any]:
    """The settings in a database, which has to hold a table.

    Args:
        connection: the open database.
        path: its file, for messages.
        table: the one that it has to hold.

    Raises:
        SchemeError: a database of something else, or none.
    """

    def find() -> Any:
        names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not {"study", table.name} <= names:
            raise SchemeError(f"{path} is no file of a study: it has no table {table.name!r}.")
        there = {row[1] for row in connection.execute(f"PRAGMA table_info({table.name})")}
        if lacking := [name for name in table.columns if name not in there]:
            raise SchemeError(
                f"{path} is of another version: its table {table.name!r} has no {', '.join(lacking)};\n"
                "  go on with the version that made it, or give this study a file of its own."
            )
        return connection.execute("SELECT settings FROM study").fetchone()

    try:
        return json.loads(patient(find, path)[0])
    except (TypeError, ValueError) as error:
        # A SchemeError is a ValueError too, and says what is wrong already.
        if isinstance(error, SchemeError):
            raise
        raise SchemeError(f"{path} is no file of a study: {error}.") from None


def read(path: str | Path, table: Table[Any, Any] = NETWORKS) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A study's settings and its lines in the order of their keys; also of one that is still running.

    Args:
        path: of the database.
        table: which of its tables.

    Raises:
        SchemeError: no such file, or no study.
    """
    path = Path(path)
    if not path.is_file():
        raise SchemeError(f"there is no file {str(path)!r}; a study makes one: odenets study run -c FILE.yaml.")
    check_file(path)
    try:
        # Read-only, so that looking at a running study cannot lock its writer out for longer than a query takes.
        settings, lines = _read(path, table, "ro")
    except sqlite3.OperationalError:
        # A process that was killed while it wrote has left a journal, which only a writer can take back.
        try:
            settings, lines = _read(path, table, "rw")
        except sqlite3.OperationalError as error:
            raise SchemeError(
                f"{path} was left in the middle of a change, which cannot be taken back here: {first_line(error)}\n"
                "  Make the file and its folder writable, or copy all files of that name to such a folder."
            ) from None
    for line in lines:
        try:
            line |= {name: json.loads(line[name]) for name in table.structured}
        except (TypeError, ValueError):
            raise SchemeError(
                f"{path} is damaged: the line of {line[table.key]!r} is not whole\n  Bring back a copy of it."
            ) from None
    return settings, lines


def _read(path: Path, table: Table[Any, Any], mode: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=1)
    connection.row_factory = sqlite3.Row
    try:
        settings = settings_of(connection, path, table)
        order = f'SELECT * FROM {table.name} ORDER BY "{table.key}"'
        return settings, [dict(row) for row in patient(lambda: connection.execute(order).fetchall(), path)]
    finally:
        connection.close()
