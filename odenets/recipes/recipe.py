"""A recipe: a network, how it is trained, and its published figures.

A recipe is a row of a paper's table. Its settings are a configuration as ``lightning fit -c`` takes it, assembled from
three parts: the network of a registered model (``revcol_tiny``) with the row's changes, the training that many rows
share, and the data.
"""

import copy
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from textwrap import fill
from types import MappingProxyType
from typing import Any, Literal

from torch import nn

from schemes import SchemeError

from ..models import catalogue
from .data import Data

Stage = Literal["train", "pretrain", "fine-tune"]
# Options that the data determine, so that no configuration states them twice.
LINKED = ("num_classes", "in_chans")


@dataclass(frozen=True)
class Paper:
    """A paper, and which of its tables and figures have rows.

    Attributes:
        title: title of the paper.
        cite: authors and year.
        arxiv: its arXiv number.
        shown: its tables and figures in order: name, and what it shows.
        rows: lines of them that no recipe trains.
        note: what is missing here from the paper.
    """

    title: str
    cite: str
    arxiv: str
    shown: Mapping[str, str]
    rows: "tuple[Row, ...]" = ()
    note: str = ""

    @property
    def source(self) -> str:
        """Authors, year and arXiv number, as cited in a comment."""
        return f"{self.cite}, arXiv {self.arxiv}"


@dataclass(frozen=True)
class Row:
    """A line of a table or figure that no recipe trains.

    Attributes:
        shown: the table or figure.
        what: the line.
        published: its figure; empty where it is not known here.
        command: the command that draws or measures it here.
        needs: what is missing for it.
    """

    shown: str
    what: str
    published: str = ""
    command: str = ""
    needs: str = ""


@dataclass(frozen=True)
class Recipe:
    """A row of a paper's table as a configuration.

    Attributes:
        name: short name, unique: ``recipe:NAME``.
        paper: the paper that has the row.
        family: common name of the family of networks.
        size: size of the network: T, 170 layers.
        data: what it is trained on.
        stage: "train", "pretrain" (on data of other classes than those of its evaluation) or "fine-tune".
        model: a registered model, or the path of a function or class that builds one.
        training: the configuration without the network: ``model``, ``data``, ``trainer``, and anything else.
        options: the row's changes to the network.
        published: (table or figure, figure) wherever the row appears; the figure is empty where it is not known here.
        hardware: the paper's hardware.
        differs: the differences from the paper, a sentence each.
        needs: what it takes to measure it.
        parameters: number of parameters of the published network, as its code counts them.
        file: the file in ``experiments`` that shows it, where there is one.
    """

    name: str
    paper: Paper
    family: str
    size: str
    data: Data
    stage: Stage
    model: str
    training: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    published: tuple[tuple[str, str], ...] = ()
    hardware: str = "not known here"
    differs: tuple[str, ...] = ()
    needs: str = "a GPU"
    parameters: int | None = None
    file: str = ""

    @cached_property
    def net(self) -> dict[str, Any]:
        """The network as a configuration: a class, and all options in which it differs from the class's defaults."""
        if "." in self.model:
            return _plain({"class_path": self.model, "init_args": dict(self.options)})
        kind = catalogue.model_kind(self.model)
        if kind is None:
            raise SchemeError(f"recipe {self.name}: {self.model} is no class of odenets.models.")
        given = {**catalogue.variant(self.model), **self.options}
        args = {key: value for key, value in given.items() if key not in LINKED}
        return _plain({"class_path": f"odenets.models.{kind.__name__}", "init_args": args})

    @property
    def settings(self) -> dict[str, Any]:
        """The whole configuration, as a dictionary of plain values; a new one each time.

        Example:
            >>> from odenets import recipes
            >>> recipes.find("revcol_small").settings["model"]["init_args"]["net"]["init_args"]["columns"]
            8
        """
        # A deep copy: rows share their training, and a caller may change the result.
        parts = copy.deepcopy(_plain(self.training))
        model = parts["model"]
        init_args = {"net": copy.deepcopy(self.net), **model["init_args"]}
        return {
            "seed_everything": 0,
            "run_dir": f"runs/{self.name}",
            **{key: part for key, part in parts.items() if key not in ("model", "data", "trainer")},
            "model": {"class_path": model["class_path"], "init_args": init_args},
            "data": parts["data"],
            "trainer": parts["trainer"],
        }

    def build(self) -> nn.Module:
        """Builds the network itself, with as many classes as the data have.

        Example:
            >>> from odenets import recipes
            >>> sum(p.numel() for p in recipes.find("cifar10_densenet40_k12").build().parameters())
            1019722
        """
        # Without jsonargparse, which need not be installed to build a network.
        module, _, name = self.net["class_path"].rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        return kind(**{**self.net["init_args"], "num_classes": self.data.classes})

    @property
    def line(self) -> str:
        """A summary in one line."""
        figure = next((f for _, f in self.published if f), "")
        return f"{self.family} {self.size}, {self.data.name}, {self.stage}{f': {figure}' if figure else ''}"

    @property
    def text(self) -> str:
        """The configuration as a YAML file, with a comment on how to run it and what was published."""
        import yaml  # comes with the extra `train`, without which no recipe runs

        body = yaml.safe_dump(self.settings, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
        return f"{self.head}{body}"

    @property
    def head(self) -> str:
        """The comment at the top of the file."""
        shown: dict[str, list[str]] = {}
        for where, figure in self.published:
            shown.setdefault(figure, []).append(where)
        figures = [f"{figure} ({', '.join(where)})" for figure, where in shown.items() if figure]
        lines = [
            f"lightning fit -c recipe:{self.name}{self.data.option}{' --weights FILE' * (self.stage == 'fine-tune')}",
            "",
            f"{self.family} {self.size} on {self.data.name}, {self.stage}.",
            f"Source: {self.paper.source}{f', {self.published[0][0]}' if self.published else ''}.",
            self.data.how,
            f"Published: {'; '.join(figures)}." if figures else "Published: no figure of this row is known here.",
            *(f"Differs: {sentence}" for sentence in self.differs),
            f"Expect: not measured here; needs {self.needs}.",
            f"Hardware of the paper: {self.hardware}.",
        ]
        return "".join(_comment(line) for line in lines)


def _comment(line: str) -> str:
    if not line:
        return "#\n"
    return fill(line, 118, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False) + "\n"


def _plain(value: Any) -> Any:
    """Returns the same value with new plain dictionaries and lists, as in YAML."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, tuple | list) else value
