"""Trains the networks of a study: one after the other in this process, or in Ray workers on one machine or many.

One process hands out the work and writes the results. Ray finds the workers, sends them work, and moves a network to
another worker if its own dies. Recorded networks are not trained again, so a study that was stopped resumes.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from schemes import SchemeError

from .space import Candidate
from .store import Result, Store, read
from .train import Study, train
from .workers import by_ray, check_gpus, check_workers, here

Trainer = Callable[[Study, Candidate], Result]


class Progress(NamedTuple):
    """The progress of a study, reported after each network.

    Attributes:
        done: number of recorded networks, including those of earlier runs.
        total: number of networks of the study.
        candidate: the network.
        result: the result of training it.
    """

    done: int
    total: int
    candidate: Candidate
    result: Result


def run(
    study: Study,
    store: Store,
    *,
    workers: int | None = None,
    address: str | None = None,
    trainer: Trainer = train,
) -> Iterator[Progress]:
    """Trains the networks that the store lacks; records and then yields each as soon as it is trained.

    Args:
        study: defines the networks and their training.
        store: an open store; networks that it holds are skipped.
        workers: 0 trains in this process, one network after the other. Otherwise the number of Ray processes on this
            machine or, with an ``address``, the most on its machines. None: as many as the cores allow, at
            ``study.threads`` each.
        address: address of a running Ray cluster ("auto" finds it); its machines have the pictures under the same path.
        trainer: trains one network.

    Raises:
        SchemeError: the store holds other networks than the study draws for these pictures, as for another number of
            classes; fewer than 0 workers; or Ray is needed and is missing, or cannot be reached.
    """
    check_workers(workers)
    classes = study.data().num_classes
    candidates = study.candidates(classes)
    done = store.done()
    _check_recorded(store, candidates, study.classes or classes)
    left = [c for c in candidates if c.number not in done]
    # Before any worker is started: a study that is done needs neither Ray nor a GPU.
    if not left:
        return
    work = partial(trainer, study)
    if workers == 0:
        check_gpus("study.gpus", study.gpus, torch.cuda.device_count())
        results = here(left, work)
    else:
        results = by_ray(
            left,
            work,
            lambda error: Result("failed", error=error),
            workers=workers,
            address=address,
            threads=study.threads,
            gpus=study.gpus,
            option="study.gpus",
            otherwise="or train one network at a time: --workers 0",
        )
    finished = len(candidates) - len(left)
    for candidate, result in results:
        # Recorded before it is yielded: a consumer that stops at a network's report does not lose its result.
        store.add(candidate, result)
        finished += 1
        yield Progress(finished, len(candidates), candidate, result)


def _check_recorded(store: Store, candidates: Sequence[Candidate], classes: int) -> None:
    """Refuses to go on where the recorded networks are others than those that are drawn now under their numbers."""
    recorded = {line["number"]: line for line in read(store.path, store.table)[1]}
    for candidate in candidates:
        line, own = recorded.get(candidate.number), vars(candidate)
        # The settings cannot tell: they do not say how many classes "all of them" were.
        if line is not None and (other := [name for name in own if line[name] != own[name]]):
            differs = ", ".join(f"{name} {line[name]} there, {own[name]} now" for name in other[-2:])
            raise SchemeError(
                f"{store.path} holds other networks than are drawn for pictures of {classes} classes (number "
                f"{candidate.number}: {differs})\n"
                "  Go on over the pictures that it was begun with, or give this study a file of its own."
            )
