"""Figures under equal scores, which 16 bits make common, and labels that do not count: beside torchmetrics."""

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from odenets.training import Classifier
from odenets.training.judge import Figures, predict
from odenets.training.order import IGNORED
from odenets.training.ranking import best_of
from odenets.training.sets import Cached

from .test_classifier import Random, pytestmark, sgd, trainer  # noqa: F401


def tied(n: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of which many are equal, and labels."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, classes, generator=draw).round(), torch.randint(classes, (n,), generator=draw)


def untied(scores: torch.Tensor) -> torch.Tensor:
    """The same order, but of equal scores the first the greatest: torchmetrics takes any of them among its first k."""
    return scores.double() - 1e-6 * torch.arange(scores.shape[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 2, 7, 10, 100, 1000])
def test_of_equal_scores_the_first_class_is_the_first(classes, dtype):
    scores = tied(40, classes, classes)[0].to(dtype)
    values, places = best_of(scores, 5)
    for row, best in zip(scores.float().numpy(), places, strict=True):
        assert best.tolist() == np.lexsort((np.arange(classes), -row))[:5].tolist()
    assert torch.equal(values, scores.gather(1, places)) and torch.equal(places[:, 0], scores.argmax(1))


class Table(nn.Module):
    """Gives the row of scores whose number is the picture's level."""

    def __init__(self, scores):
        super().__init__()
        self.scores, self.unused = nn.Parameter(scores), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.scores[(x[:, 0, 0, 0] * 0.5 + 0.5).round().long()]  # Random's mean and deviation


class Tied(Random):
    def setup(self, stage):
        x = torch.arange(float(self.n)).view(-1, 1, 1, 1).expand(-1, 1, 6, 6).contiguous()
        self.sets = dict.fromkeys(("train", "val", "test"), Cached(x, self.labels))


@pytest.mark.parametrize("uncounted", [0, 5])
def test_validation_gives_the_figures_of_torchmetrics(tmp_path, uncounted):
    scores, labels = tied(21, 120, 3)  # batches of 8, 8 and 5
    labels[:6] = scores[:6].argmax(1)
    labels[6:10] = best_of(scores, 5)[1][6:10, 4]
    labels[torch.randperm(21, generator=torch.Generator().manual_seed(1))[:uncounted]] = IGNORED
    data = Tied(120, 21)
    data.labels = labels
    figures = trainer(tmp_path).validate(Classifier(Table(scores), sgd), data, verbose=False)[0]
    counted = labels != IGNORED
    for name, k in (("val/acc", 1), ("val/acc5", 5)):
        want = MulticlassAccuracy(120, top_k=k, average="micro", ignore_index=IGNORED)
        assert figures[name] == pytest.approx(float(want(scores if k == 1 else untied(scores), labels))), name
    want = nn.functional.cross_entropy(scores[counted], labels[counted])
    assert figures["val/loss"] == pytest.approx(float(want))


@pytest.mark.parametrize("seed", range(4))
def test_evaluation_and_prediction_do_too(seed):
    classes = 8 + seed
    scores, labels = tied(50, classes, seed)
    figures = Figures([str(k) for k in range(classes)])
    for rows, own in zip(scores.softmax(1).split(7), labels.split(7), strict=True):
        figures.add(rows, own)
    got = figures.summary()
    for name, k, given in (("accuracy", 1, scores), ("top5", 5, untied(scores))):
        want = MulticlassAccuracy(classes, top_k=k, average="micro")(given, labels)
        assert got[name]["value"] == pytest.approx(float(want)), name
    per_class = MulticlassAccuracy(classes, average=None)(scores, labels)
    for row in got["classes"]:
        if row["pictures"]:
            assert row["accuracy"]["value"] == pytest.approx(float(per_class[int(row["class"])]))


def test_predictions_name_the_first_of_equal_classes(monkeypatch):
    scores = torch.zeros(3, 6)
    scores[1, 4] = 1.0

    class Trained:
        classes = tuple("012345")

    monkeypatch.setattr("odenets.training.judge.judge", lambda *_: ((i, row, "") for i, row in enumerate(scores)))

    class Names:
        name = staticmethod(str)

    assert [p.classes[:3] for p in predict(Trained(), Names())] == [list("012"), list("401"), list("012")]
