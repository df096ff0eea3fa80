"""A small language and its translation, made by a grammar: enough to see whether an encoder and a decoder train."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ..models.revcol_seq import END, PAD, START
from .errors import DataError
from .groups import check_optimizer, make_optimizer
from .module import of_a_whole_step, share_of
from .order import IGNORED, loader
from .schedules import Schedule, WarmupCosine, scheduled

NOUNS, VERBS, ADJECTIVES = 12, 8, 8
THAT = 3  # begins a relative clause
_N, _V, _A = 4, 4 + NOUNS, 4 + NOUNS + VERBS
WORDS = _A + ADJECTIVES
# The target marks the object's nouns, and a verb agrees with its subject (two kinds of nouns).
_OBJECT, _AGREES = WORDS, WORDS + NOUNS
TARGET_WORDS = _AGREES + VERBS


def sentence(random: torch.Generator, depth: int = 2) -> tuple[list[int], list[int]]:
    """A sentence and its translation: subject verb object becomes subject object verb, with endings.

    Adjectives stand before the source's nouns and after the target's; an object is marked; a verb takes another form
    after a noun of the second kind, however far away; relative clauses nest.

    Args:
        random: what is drawn from.
        depth: how deep relative clauses nest.
    """

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=random))

    def noun(level: int, case: int) -> tuple[list[int], list[int], int]:
        word = pick(NOUNS)
        adjectives = [_A + pick(ADJECTIVES) for _ in range(pick(3))]
        source = [*adjectives, _N + word]
        target = [(_OBJECT if case else _N) + word, *reversed(adjectives)]
        if level and pick(3) == 0:
            s, t = predicate(level - 1, word % 2)
            source, target = [*source, THAT, *s], [*target, THAT, *t]
        return source, target, word % 2

    def predicate(level: int, kind: int) -> tuple[list[int], list[int]]:
        verb = pick(VERBS)
        s, t, _ = noun(level, 1)
        return [_V + verb, *s], [*t, (_AGREES if kind else _V) + verb]

    s, t, kind = noun(depth, 0)
    s2, t2 = predicate(depth, kind)
    return s + s2, t + t2


class Grammar(L.LightningDataModule):
    """Sentences of a synthetic language and their translations; see ``sentence``.

    Args:
        sentences: for training; a tenth of as many others, which are not among them, validate.
        batch_size: sentences per batch.
        length: longer ones are left out.
        seed: of the sentences.
    """

    def __init__(self, sentences: int = 20_000, batch_size: int = 64, length: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.sentences, self.batch_size, self.length, self.seed = sentences, batch_size, length, seed

    def setup(self, stage: str) -> None:
        random = torch.Generator().manual_seed(self.seed)
        held = self.sentences // 10 + 1
        found: dict[tuple[int, ...], list[int]] = {}
        # By their words, since short sentences come up again: none that is trained on may validate.
        missed = 0
        while len(found) < self.sentences + held:
            s, t = sentence(random)
            known, missed = len(found), missed + 1
            if len(s) + 2 <= self.length and len(t) + 2 <= self.length:
                found[tuple(s)] = t
            if len(found) > known:
                missed = 0
            elif missed > 10_000:
                raise DataError(
                    f"data.sentences={self.sentences}: {known:,} sentences of at most data.length={self.length} words "
                    f"were found, wanted {self.sentences + held:,} with those held out\n"
                    "  Give a smaller data.sentences, or a larger data.length"
                )
        pairs = [self._padded([START, *s, END]) + self._padded([START, *t, END]) for s, t in found.items()]
        data = torch.tensor(pairs).view(-1, 2, self.length)
        self.train_set = TensorDataset(data[held:, 0], data[held:, 1])
        self.val_set = TensorDataset(data[:held, 0], data[:held, 1])

    def _padded(self, words: list[int]) -> list[int]:
        return words + [PAD] * (self.length - len(words))

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(self, self.train_set, self.batch_size, train=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(self, self.val_set, self.batch_size, train=False)


class Translator(L.LightningModule):
    """Trains a net that translates: ``net(source, target)`` gives the logits of each next word.

    Logs train/loss, val/loss, val/acc (share of right words, given the right ones before) and val/sentences (share of
    whole sentences that the net translates on its own).

    Args:
        net: the network, with ``translate``.
        optimizer: called with the parameters.
        schedule: stepped after each optimiser step.
        label_smoothing: share of each word's weight that is spread over all words.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        schedule: Schedule | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer
        self.schedule = schedule or WarmupCosine()
        self.label_smoothing = label_smoothing
        check_optimizer(optimizer, [{"params": list(net.parameters())}])  # refused here, before any data are read

    def _loss(self, batch: Sequence[Tensor], smoothing: float) -> tuple[Tensor, Tensor]:
        source, target = batch
        logits, want = self.net(source, target[:, :-1]), target[:, 1:]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits.flatten(0, 1), want.flatten(), ignore_index=PAD, label_smoothing=smoothing)
        there = want != PAD
        return loss, (logits.argmax(-1) == want)[there].float().mean()

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss, _ = self._loss(batch, self.label_smoothing)
        if self.trainer.world_size > 1:
            # Sentences are of unequal length, and each word counts the same, whichever process has it.
            loss = share_of(self.trainer, (batch[1][:, 1:] != PAD).sum(), loss.dtype) * loss
        self.log("train/loss", loss, prog_bar=True, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super().backward(of_a_whole_step(self.trainer, loss), *args, **kwargs)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        source, target = batch
        counted = (target != IGNORED).all(1)  # the rest is there to give every process equally many
        count = int(counted.sum()) if self.trainer.world_size > 1 else len(target)
        if count:
            source, target = source[counted], target[counted]
        else:  # translated all the same, since the processes may meet in it
            target = target.clamp(min=START)
        loss, words = self._loss((source, target), 0.0)
        want = target[:, 1:]
        found = self.net.translate(source, want.shape[1] + 1)  # type: ignore[operator]
        # The net stops when all its sentences have ended, which may be before the right ones do.
        found = F.pad(found, (0, want.shape[1] - found.shape[1]), value=PAD)
        right = (found == want).all(1).float().mean()
        # By what each is a mean over, so that the figures do not depend on how sentences fall into batches.
        counted_words = int((want != PAD).sum()) if count else 0
        each = (
            ("val/loss", loss, counted_words),
            ("val/acc", words, counted_words),
            ("val/sentences", right, count),
        )
        for name, figure, weight in each:
            # Times the processes, since Lightning averages the counts over them and drops the fraction.
            weight *= self.trainer.world_size
            self.log(name, figure, prog_bar=True, on_epoch=True, batch_size=weight, sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.optimizer, [{"params": list(self.parameters())}])
        return scheduled(self.trainer, optimizer, self.schedule)
