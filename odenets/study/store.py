"""An SQLite file with one row per trained network, written as soon as its result is known."""

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
    """The result of training one network.

    Attributes:
        status: "trained", "diverged" (the loss is not finite), or "failed".
        accuracy: top-1 accuracy on the validation pictures, as a share; None unless it was trained.
        loss: mean cross-entropy on them.
        train_loss: mean cross-entropy of the last epoch.
        seconds: training time.
        kept_mib: what a training step keeps for its backward pass, in MiB.
        ranks: (width, numerical rank, effective rank) of the features after the stem and after every step.
        error: the last line of the error.
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
    """A table whose columns are the fields of two dataclasses; lists and mappings are JSON.

    Attributes:
        name: name of the table.
        task: class of what is trained.
        outcome: class of its result; has a field "status".
        key: the field that identifies a task.
    """

    name: str
    task: type[Task]
    outcome: type[Outcome]
    key: str

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in order."""
        return [f.name for kind in (self.task, self.outcome) for f in fields(kind)]  # type: ignore[arg-type]

    @property
    def structured(self) -> list[str]:
        """Names of the columns that hold JSON."""
        return [name for name, hint in self._hints().items() if get_origin(hint) in (list, dict)]

    def _hints(self) -> dict[str, Any]:
        return {**get_type_hints(self.task), **get_type_hints(self.outcome)}

    @property
    def declared(self) -> str:
        """The declaration of the columns in SQL."""
        hints = self._hints()
        # No type for what may be None or is JSON: SQLite then stores the value as given.
        kinds = {name: _TYPES.get(hints[name], "") for name in self.columns}
        return ", ".join(f'"{n}" {k}{" PRIMARY KEY" if n == self.key else ""}' for n, k in kinds.items())


NETWORKS = Table("networks", Candidate, Result, "number")


class Store(Generic[Task, Outcome]):
    """The results of a study in an SQLite file, one row per network; a context manager.

    Only the process that hands out the work writes. Each row is its own transaction, so recorded rows survive whatever
    stops the process; the database refuses to record a network twice. Other processes may read at any time. If a reader
    holds the file for long, a write waits for as long as that takes, and a notice says so.

    Args:
        path: the file; a new one is made beside its place and renamed, so that a file at that place is complete.
        settings: what determines the results. A file that holds networks trained with other settings is refused.
        table: the table that holds the rows.
        growing: names of settings that may grow: lists in them are joined with the recorded ones, and mappings key by
            key; any other value in them stays as it is.
        check: raises a SchemeError for invalid settings; called with recorded and new ones joined.
        begun: returns whether some networks are partly trained and have no row yet.

    Raises:
        SchemeError: other settings, another process that writes, a place that cannot be written to, or a file that is
            not such a database.
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
            # No waiting: a second driver would train the same networks.
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
        except BaseException as error:
            # `__exit__` is not called if `__enter__` raises, and this process would keep the lock.
            if hasattr(self, "connection"):
                self.connection.close()
            self.lock.release()
            # Also while it only reads: a killed writer has left a journal, which cannot be rolled back here.
            if isinstance(error, sqlite3.OperationalError):
                raise _read_only(self.path, error) from None
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
        # Without an isolation level no transaction is open between two statements. The timeout is short, since
        # `patient` does the waiting.
        self.connection = sqlite3.connect(self.path, timeout=1, isolation_level=None)
        # Both have gone through JSON, which turns tuples into lists.
        old, new = settings_of(self.connection, self.path, self.table), json.loads(json.dumps(self.settings))
        other = [text for name in {**old, **new} for text in self._other(name, old.get(name), new.get(name))]
        if other and (self.done() or self.begun()):
            raise SchemeError(
                f"{self.path} was begun with other settings ({'; '.join(other)});\n"
                "  go on with the same ones, or give this study a file of its own."
            )
        # If nothing has been trained under the old settings yet, they are dropped, plan included.
        for name in () if other else self.growing:
            new[name] = joined(old[name], new[name]) if name in old and name in new else old.get(name, new.get(name))
        if self.check is not None:
            self.check(new)
        if new != old:
            self._write("UPDATE study SET settings = ?", [json.dumps(new)])
        self.settings = new

    def _other(self, name: str, old: Any, new: Any) -> list[str]:
        if name not in self.growing:
            # Compared as text: 1, 1.0 and True are equal in Python, but differ as values of an option.
            return [] if json.dumps(old) == json.dumps(new) else [f"{name}: {old!r} there, {new!r} now"]
        # A setting that one of them lacks is growth, not a conflict.
        found = [] if old is None or new is None else conflicts(old, new)
        return [f"{place}: {a} there, {b} now" for place, a, b in found]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.connection.close()
        self.lock.release()

    def _write(self, statement: str, values: list[Any]) -> int:
        """Runs one statement as a transaction of its own; returns the number of rows that it changed."""
        try:
            return patient(lambda: self.connection.execute(statement, values).rowcount, self.path)
        except sqlite3.OperationalError as error:
            raise _read_only(self.path, error) from None

    def done(self) -> set[Any]:
        """Returns the keys (numbers) of the recorded networks."""
        rows = patient(
            lambda: self.connection.execute(f'SELECT "{self.table.key}" FROM {self.table.name}').fetchall(), self.path
        )
        return {key for (key,) in rows}

    def add(self, task: Task, outcome: Outcome) -> None:
        """Records one network.

        Args:
            task: what was to be trained.
            outcome: the result.

        Raises:
            sqlite3.IntegrityError: the network is recorded already.
        """
        line = {**asdict(task), **asdict(outcome)}  # type: ignore[call-overload]
        line |= {name: json.dumps(line[name]) for name in self.table.structured}
        columns = self.table.columns
        # By name: a file of a later version may have more columns.
        names = ", ".join(f'"{name}"' for name in columns)
        self._write(
            f"INSERT INTO {self.table.name} ({names}) VALUES ({', '.join('?' * len(columns))})",
            [line[name] for name in columns],
        )

    def failed(self) -> int:
        """Returns the number of networks that failed."""
        statement = f"SELECT count(*) FROM {self.table.name} WHERE status = 'failed'"
        return patient(lambda: self.connection.execute(statement).fetchone()[0], self.path)

    def forget_failed(self, among: Collection[Any] | None = None) -> int:
        """Removes the rows of networks that failed, so that they are trained again; returns how many there were.

        Args:
            among: keys of the networks that may be removed; None removes all that failed.
        """
        statement = f"DELETE FROM {self.table.name} WHERE status = 'failed'"
        if among is None:
            return self._write(statement, [])
        # As one JSON text, since a statement takes a limited number of values.
        chosen = f'{statement} AND "{self.table.key}" IN (SELECT value FROM json_each(?))'
        return self._write(chosen, [json.dumps(list(among))])


def _read_only(path: Path, error: sqlite3.OperationalError) -> SchemeError:
    return SchemeError(
        f"{path} cannot be written to: {first_line(error)}\n  Make the file and its folder writable, or copy the file."
    )


Value = TypeVar("Value")


def patient(act: Callable[[], Value], path: Path) -> Value:
    """Runs an operation on a database, retrying while another process has it locked.

    Args:
        act: the operation; succeeds, or fails as a whole.
        path: path of the database, for the notice after five seconds.

    Raises:
        SchemeError: the database is damaged.
        sqlite3.OperationalError: it cannot be written to.
        sqlite3.IntegrityError: the row exists already.
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
    """Joins two values: lists by appending what only the second has, mappings key by key; else takes the second.

    Args:
        old: the value that was read.
        new: the value that is joined to it.
    """
    if isinstance(old, list) and isinstance(new, list):
        return [*old, *(value for value in new if value not in old)]
    if isinstance(old, dict) and isinstance(new, dict):
        return {**old, **{k: joined(old[k], v) if k in old else v for k, v in new.items()}}
    return new


def conflicts(old: Any, new: Any, place: str = "") -> list[tuple[str, Any, Any]]:
    """Returns what ``joined`` would replace: differing values at one place, not both lists or both mappings.

    Args:
        old: the value that was read.
        new: the value that would be joined to it.
        place: the keys that lead to these values.

    Returns:
        The keys, the old value and the new value of each conflict.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        return [c for k in old if k in new for c in conflicts(old[k], new[k], f"{place}, {k}" if place else str(k))]
    both = isinstance(old, list) and isinstance(new, list)
    return [] if both or json.dumps(old) == json.dumps(new) else [(place, old, new)]


def check_file(path: Path) -> None:
    """Refuses an empty file: SQLite takes it for a new database, and a study would silently begin again.

    Args:
        path: path of the database.

    Raises:
        SchemeError: the file is empty, or is not a file.
    """
    if not path.is_file():
        raise SchemeError(f"{path} is no file of a study: it is a folder;\n  give another place, or move it away.")
    if path.stat().st_size == 0:
        raise SchemeError(
            f"{path} is no file of a study: it is empty, as after a full disk or a broken copy;\n"
            "  bring back a copy of it, or remove it to begin anew."
        )


def settings_of(connection: sqlite3.Connection, path: Path, table: Table[Any, Any]) -> dict[str, Any]:
    """Reads the settings from a database, which must hold a given table.

    Args:
        connection: the open database.
        path: its file, for messages.
        table: the table that it must hold.

    Raises:
        SchemeError: the database is of something else, or not a database.
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
        # A SchemeError is a ValueError too, and already says what is wrong.
        if isinstance(error, SchemeError):
            raise
        raise SchemeError(f"{path} is no file of a study: {error}.") from None


def read(path: str | Path, table: Table[Any, Any] = NETWORKS) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Reads a study's settings and its rows, ordered by their keys; the study may still be running.

    Args:
        path: path of the database.
        table: the table to read.

    Raises:
        SchemeError: no such file, or not a study.
    """
    path = Path(path)
    if not path.is_file():
        raise SchemeError(f"there is no file {str(path)!r}; a study makes one: odenets study run -c FILE.yaml.")
    check_file(path)
    try:
        # Read-only, so that reading a running study locks its writer out for no longer than a query takes.
        settings, lines = _read(path, table, "ro")
    except sqlite3.OperationalError:
        # A process that was killed while writing has left a journal, which only a writer can roll back.
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
