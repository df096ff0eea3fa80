"""Trains the networks of a study: one after the other here, or by workers of Ray, on this machine or on many.

One process hands out the work and writes the results; Ray finds the workers, brings them work, and gives a network to
another worker where one dies. What is recorded is not trained again, so that a study that was stopped goes on.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from .space import Candidate
from .store import Result, Store
from .train import Study, train
from .workers import by_ray, check_gpus, here

Trainer = Callable[[Study, Candidate], Result]


class Progress(NamedTuple):
    """After each network.

    Attributes:
        done: networks that are recorded, those of earlier runs included.
        total: networks of the study.
        candidate: the network.
        result: what training it gave.
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
    """Trains what the store lacks, records every network as soon as it is trained, and yields it.

    Args:
        study: says what to train.
        store: open; what it holds is skipped.
        workers: 0 trains here, one after the other; otherwise so many processes of Ray on this machine, or, with an
            ``address``, at most so many on its machines. None: as many as the cores (``study.threads`` each) allow.
        address: of a running Ray cluster ("auto" finds it), whose machines have the pictures under the same path.
        trainer: what trains one network.

    Raises:
        SchemeError: Ray is needed and missing, or not to be reached.
    """
    candidates = study.candidates(study.data().num_classes)
    done = store.done()
    left = [c for c in candidates if c.number not in done]
    # Before any worker is asked for: a study that is done needs neither Ray nor a GPU to say so.
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
        # Recorded before it is yielded: who stops at the report of a network loses nothing of it.
        store.add(candidate, result)
        finished += 1
        yield Progress(finished, len(candidates), candidate, result)
