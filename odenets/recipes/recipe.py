"""What a recipe is: a network, how it is trained, and what was published of it.

A recipe is a row of a paper's table. Its settings are a configuration as ``lightning fit -c`` takes it, put together
from three parts: the network of a registered model (``revcol_tiny``) with what the row changes, the training that many
rows share, and the data.
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
# What the data say, so that no configuration says it twice.
LINKED = ("num_classes", "in_chans")


@dataclass(frozen=True)
class Paper:
    """A paper, and which of its tables and figures have rows.

    Attributes:
        title: of the paper.
        cite: authors and year.
        arxiv: its number.
        shown: its tables and figures in order: name, what it shows.
        rows: lines of them that no recipe trains.
        note: what of the paper is not here.
    """

    title: str
    cite: str
    arxiv: str
    shown: Mapping[str, str]
    rows: "tuple[Row, ...]" = ()
    note: str = ""

    @property
    def source(self) -> str:
        """Authors, year and number, as a comment cites them."""
        return f"{self.cite}, arXiv {self.arxiv}"


@dataclass(frozen=True)
class Row:
    """A line of a table or figure that no recipe trains.

    Attributes:
        shown: the table or figure.
        what: the line.
        published: its figure; empty where it is not known here.
        command: what draws or measures it here.
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
        paper: where the row stands.
        family: of networks, as people name it.
        size: of the network: T, 170 layers.
        data: what it is trained on.
        stage: "train", "pretrain" (on data of other classes than it is judged on) or "fine-tune".
        model: a registered model, or the path of a function or class that builds one.
        training: the configuration without the network: ``model``, ``data``, ``trainer``, and what else there is.
        options: what the row changes of the network.
        published: (table or figure, figure) wherever the row stands; the figure is empty where it is not known here.
        hardware: of the paper.
        differs: what here is not as in the paper, a sentence each.
        needs: what it takes to measure it.
        parameters: of the published network, as its code counts them.
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
        # A copy all the way down: rows share their training, and whoever asks may change what it gets.
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
        """The network itself, with as many classes as the data have.

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
        """One line about it."""
        figure = next((f for _, f in self.published if f), "")
        return f"{self.family} {self.size}, {self.data.name}, {self.stage}{f': {figure}' if figure else ''}"

    @property
    def text(self) -> str:
        """The configuration as a YAML file, with a comment that says how it is run and what was published."""
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
    """The same with dictionaries and lists of their own, as YAML has them."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, tuple | list) else value
