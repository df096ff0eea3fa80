"""The metrics file of a run: every row once, even if the run is killed between two of them."""

import csv
import io
from pathlib import Path

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from .files import parts_of, write_whole


def logged_rows(folder: Path) -> list[dict[str, str]]:
    """Returns the rows that a run has logged so far, each once and in order, however often it was resumed.

    Args:
        folder: of the run.
    """
    rows: list[dict[str, str]] = []
    for path in (*parts_of(folder), folder / "metrics.csv"):
        if path.is_file():
            with path.open(newline="") as file:
                rows += csv.DictReader(file)
    return rows


class Metrics(CSVLogger):
    """``metrics.csv`` in a run's folder."""

    def __init__(self, folder: str | Path) -> None:
        # Without a name and a version, the file is placed in the run's folder itself.
        super().__init__(folder, name="", version="")
        self.part = 0

    def count_parts(self) -> None:
        """Sets the number of this part of the run's metrics, once the earlier parts are set aside."""
        self.part = len(parts_of(Path(self.save_dir)))

    @property
    @rank_zero_experiment
    def experiment(self) -> "_Writer":
        if self._experiment is None:
            self._experiment = _Writer(log_dir=self.log_dir)
        return self._experiment  # type: ignore[return-value]

    @property
    def written(self) -> dict[str, int]:
        """The number of this part of the run's metrics, and the number of its rows that are on disk."""
        return {"part": self.part, "rows": getattr(self._experiment, "rows", 0)}


class _Writer(ExperimentWriter):
    """Lightning's writer, which truncates the file to add a column: here the new file replaces it atomically."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir=log_dir)
        self.rows = 0

    def save(self) -> None:
        # Counted before saving, which empties the list.
        self.rows += len(self.metrics)
        super().save()

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with open(self.metrics_file_path, newline="") as file:
            rows = list(csv.DictReader(file))
        writer = csv.DictWriter(out := io.StringIO(), fieldnames=fieldnames)
        writer.writeheader()
        writer.writerows(rows)
        write_whole(Path(self.metrics_file_path), out.getvalue().encode())
