"""The samples and random numbers of each process, batch by batch, as functions of the place in training.

The order of an epoch is drawn by a generator that is seeded with (seed, epoch); the random numbers of a sample are
seeded with (seed, epoch, sample), those of a batch with (seed, epoch, batch, process). So neither the number of workers
nor the moment at which a process was started, killed or resumed changes what is drawn, and no random state has to be
saved:

* epoch 3 is shuffled the same way in a run that began with it and in one that came from epoch 2;
* a run that resumes with batch 17 skips 16 batches of indices and loads none of their samples;
* two processes share each batch that one process would take whole, and augment their halves differently.
"""

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ..seeds import seed_of as seed_of
from .errors import DataError

_SEEDS: WeakKeyDictionary[L.Trainer, int] = WeakKeyDictionary()
PADDING = -1  # the epoch of a sample that is repeated to give every process the same number
IGNORED = -100  # the label of such a sample: torch's cross-entropy leaves it out
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)  # the whole numbers that can be it


def seed_generators(seed: int) -> None:
    """Seeds the generators that a module, an augmentation or a data set may draw from: torch, Python and NumPy.

    Args:
        seed: any whole number from 0 on.
    """
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


@contextmanager
def seeded_generators(seed: int) -> Iterator[None]:
    """Seeds the generators of the CPU inside the context, and restores their states on exit.

    Args:
        seed: any whole number from 0 on.
    """
    numpy = sys.modules.get("numpy")
    states = torch.random.get_rng_state(), random.getstate(), numpy and numpy.random.get_state()
    # Only the CPU's: ``torch.manual_seed`` would seed every device, and those states are not restored.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if numpy:
        numpy.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.random.set_rng_state(states[0])
        random.setstate(states[1])
        if numpy:
            numpy.random.set_state(states[2])


class TrainingOrder(DistributedSampler):
    """The samples of one process in training, as pairs (epoch, index); every process has the same number.

    The epoch's order is cut into batches of all processes; process r of w takes every w-th sample of each, from the
    r-th on. As a ``DistributedSampler``, it is not replaced by Lightning.

    Args:
        data: a data set with a length; if it has ``order(generator)``, that gives the order.
        batch_size: samples of a step in one process.
        seed: of the order.
        replicas: number of processes.
        rank: of this process.
        shuffle: a new order in each epoch; False for the data set's own.

    Attributes:
        epoch: the epoch of the next iteration.
        skip: batches that the next iteration leaves out, since they were trained on before.

    Example:
        >>> order = TrainingOrder(range(5), batch_size=2, seed=0, shuffle=False)
        >>> order.set_epoch(3)
        >>> list(order)
        [(3, 0), (3, 1), (3, 2), (3, 3)]
        >>> order.skip = 1
        >>> list(order)
        [(3, 2), (3, 3)]
    """

    def __init__(
        self, data: Any, batch_size: int, seed: int, replicas: int = 1, rank: int = 0, shuffle: bool = True
    ) -> None:
        super().__init__(data, replicas, rank, shuffle=shuffle, seed=0, drop_last=True)
        self.batch_size, self.order_seed, self.skip = batch_size, seed, 0
        # BatchNorm cannot take a last batch of one picture; a set smaller than a batch is still used.
        whole = len(data) // (batch_size * replicas) * batch_size
        self.num_samples = whole or -(-len(data) // replicas)
        self.total_size = self.num_samples * replicas

    def set_epoch(self, epoch: int) -> None:
        # A skip belongs to the epoch that was interrupted, and the same epoch may be set more than once.
        if epoch != self.epoch:
            self.skip = 0
        self.epoch = epoch

    def permutation(self, epoch: int) -> list[int]:
        """The indices of an epoch, for all processes together.

        Args:
            epoch: from 0.
        """
        if not self.shuffle:
            indices = list(range(len(self.dataset)))  # type: ignore[arg-type]
        else:
            generator = torch.Generator().manual_seed(seed_of(self.order_seed, "order", epoch))
            own = getattr(self.dataset, "order", None)
            drawn = own(generator) if own else torch.randperm(len(self.dataset), generator=generator)  # type: ignore[arg-type]
            indices = drawn.tolist()
        # Repeated where processes would get unequal numbers: one that ran out would leave the others waiting for its
        # gradients.
        return (indices * -(-self.total_size // max(1, len(indices))))[: self.total_size]

    def batch(self, epoch: int, number: int) -> list[int]:
        """The samples of this process in a batch.

        Args:
            epoch: from 0.
            number: of the batch in its epoch, from 0.
        """
        own = self.permutation(epoch)[self.rank :: self.num_replicas]
        return own[number * self.batch_size : (number + 1) * self.batch_size]

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        # Taken and cleared at once: the next epoch begins at its first batch.
        begin, self.skip = self.skip * self.batch_size, 0
        for i in self.permutation(self.epoch)[self.rank :: self.num_replicas][begin:]:
            yield self.epoch, i


class EvaluationOrder(DistributedSampler):
    """The samples of one process in evaluation, in order: every w-th, as plain indices.

    Every process has the same number, since evaluation may exchange buffers at each batch. A sample that is repeated
    for this comes as a pair (``PADDING``, index): its label becomes ``IGNORED``, and no figure counts it.

    Args:
        data: the samples; only their number is used.
        replicas: the number of processes that share them.
        rank: of this process.

    Example:
        >>> [list(EvaluationOrder(range(5), replicas=2, rank=r)) for r in (0, 1)]
        [[0, 2, 4], [1, 3, (-1, 4)]]
    """

    def __init__(self, data: Any, replicas: int = 1, rank: int = 0) -> None:
        super().__init__(data, replicas, rank, shuffle=False, drop_last=False)

    def __iter__(self) -> Iterator[Any]:
        count = len(self.dataset)  # type: ignore[arg-type]
        for i in range(self.rank, self.num_samples * self.num_replicas, self.num_replicas):
            yield i if i < count else (PADDING, count - 1)

    def __len__(self) -> int:
        return self.num_samples


class Numbered(Dataset):
    """A data set that is indexed by pairs (epoch, index), which seed its draws; a plain index is passed on.

    What the data set draws for a pair from the generators of torch, Python and NumPy is a function of the seed, the
    epoch and the index. A data set with ``takes_pairs`` gets the pairs themselves, and seeds its own draws.

    Args:
        data: the data set.
        seed: of the random numbers.
    """

    def __init__(self, data: Any, seed: int) -> None:
        self.data, self.seed = data, seed
        self.takes_pairs = getattr(data, "takes_pairs", False)
        if self.takes_pairs:
            data.seed = seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: Any) -> Any:
        # A padding sample is always seeded here: its epoch is not one that a data set could seed its draws with.
        if not isinstance(key, tuple) or (self.takes_pairs and key[0] != PADDING):
            return self.data[key]
        with seeded_generators(seed_of(self.seed, "sample", *key)):
            sample = self.data[key[1]]
        return _uncounted(sample) if key[0] == PADDING else sample

    def __getitems__(self, keys: Sequence[Any]) -> Any:
        if not hasattr(self.data, "__getitems__"):
            return [self[key] for key in keys]
        padding = [n for n, key in enumerate(keys) if isinstance(key, tuple) and key[0] == PADDING]
        if self.takes_pairs:
            batch = self.data.__getitems__([key[1] if n in padding else key for n, key in enumerate(keys)])
        else:
            # Seeded by the first key: a data set that draws for a whole batch at once gets one seed for it.
            with seeded_generators(seed_of(self.seed, "samples", *map(str, keys[:1]))):
                batch = self.data.__getitems__([key[1] if isinstance(key, tuple) else key for key in keys])
        if not padding:
            return batch
        if isinstance(batch, list):  # one sample each: the collate function comes later
            return [_uncounted(sample) if n in padding else sample for n, sample in enumerate(batch)]
        return _uncounted(batch, padding)


def _uncounted(sample: Any, rows: Any = ...) -> Any:
    """Returns a sample, or a batch as one tuple, with its label, or the labels of these rows, ignored, if it has any.

    Raises:
        DataError: A label that cannot be told from one that counts.
    """
    if not isinstance(sample, tuple | list):
        if isinstance(sample, Mapping):
            raise _cannot_be_ignored(sample)
        return sample  # a picture alone
    if len(sample) < 2 or sample[1] is None or isinstance(sample[1], str | bytes):  # a name is no label
        return sample
    parts = list(sample)
    parts[1] = _ignored(parts[1], rows)
    return type(sample)(*parts) if hasattr(sample, "_fields") else type(sample)(parts)


def _ignored(label: Any, rows: Any) -> Any:
    if getattr(getattr(label, "dtype", None), "kind", "") in ("i", "f"):  # of numpy
        scalar, labels = np.ndim(label) == 0, np.array(label)
        labels[... if scalar else rows] = IGNORED
        return labels[()] if scalar else labels
    if type(label) in (int, float):
        return type(label)(IGNORED)
    if isinstance(label, dict) and "ignored" in label:  # a target with its own flag for this
        return {**label, "ignored": torch.tensor(True)}
    if isinstance(label, torch.Tensor) and (label.is_floating_point() or label.dtype in SIGNED):
        # The data set's own tensor may be a view of all its labels.
        labels = label.clone()
        labels[... if labels.ndim == 0 else rows] = IGNORED
        return labels
    raise _cannot_be_ignored(label)


def _cannot_be_ignored(label: Any) -> DataError:
    kind = f"tensor of {label.dtype}" if isinstance(label, torch.Tensor) else type(label).__name__
    return DataError(
        f"a sample is repeated to give each process as many, and its label, a {kind}, cannot be marked as not counted\n"
        "  Let the data set return (sample, label) with a signed number or a tensor of such, or evaluate in one process"
    )


def run_seed(trainer: L.Trainer | None) -> int:
    """The seed of this run: the one that torch's generator had at the first call for this trainer.

    Args:
        trainer: of the run; None: there is none.
    """
    if trainer is None:
        return torch.initial_seed()
    # Stored per trainer, since every batch reseeds the generator.
    if trainer not in _SEEDS:
        _SEEDS[trainer] = torch.initial_seed()
    return _SEEDS[trainer]


def batch_generator(trainer: L.Trainer, device: torch.device, seed: int | None = None) -> torch.Generator | None:
    """A generator for the training batch that is being prepared, seeded by (seed, epoch, batch, process).

    Args:
        trainer: gives the place in training.
        device: of the generator.
        seed: None takes the run's.
    """
    # A data module may be used without a trainer, or with a mock of one.
    if not hasattr(trainer, "fit_loop"):
        return None
    return torch.Generator(device).manual_seed(batch_seed(trainer, run_seed(trainer) if seed is None else seed))


def batch_seed(trainer: L.Trainer, seed: int, stream: str = "augment") -> int:
    """The seed of the training batch that is being prepared; each consumer has its own `stream` of seeds.

    Args:
        trainer: of the run.
        seed: of the run.
        stream: the consumer of the random numbers.
    """
    # Counts the batches that were fetched, not those that are done: the next one is prepared while this one trains.
    number = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return seed_of(seed, stream, trainer.current_epoch, number, trainer.global_rank)


def processes(module: L.LightningDataModule) -> tuple[int, int]:
    """The number of processes that train together, and the rank of this one.

    Args:
        module: the data module.
    """
    return getattr(module.trainer, "world_size", 1), getattr(module.trainer, "global_rank", 0)


class ResumableLoader(DataLoader):
    """A loader that Lightning rightly takes for resumable: the trainer counts the batches, the order skips them."""

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty state: the place in training determines everything."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing.

        Args:
            state: as ``state_dict`` returned it.
        """


def loader(module: L.LightningDataModule, data: Any, batch_size: int, *, train: bool, **options: Any) -> DataLoader:
    """Builds a loader for training or for evaluation.

    In training, the order and the random numbers depend on the seed, the epoch and the sample alone; in evaluation,
    each sample comes once, in order. In both cases the processes of a run share the samples.

    Args:
        module: the data module, whose trainer gives the rank of this process.
        data: the data set.
        batch_size: samples of a step in one process.
        train: whether it is for training.
        options: of the ``DataLoader``.
    """
    if not train:
        order = EvaluationOrder(data, *processes(module))
        return DataLoader(Numbered(data, 0), batch_size=batch_size, sampler=order, **options)
    seed = run_seed(module.trainer)
    if getattr(module.trainer, "overfit_batches", 0):  # the same few batches in every epoch
        return DataLoader(Numbered(data, seed), batch_size=batch_size, **options)
    order = TrainingOrder(data, batch_size, seed, *processes(module))
    return ResumableLoader(Numbered(data, seed), batch_size=batch_size, sampler=order, **options)
