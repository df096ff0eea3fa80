"""Trains the networks of a study: one after the other here, or by workers of Ray, on this machine or on many.

One process hands out the work and writes the results; Ray finds the workers, brings them work, and gives a network to
another worker where one dies. What is recorded is not trained again, so that a study that was stopped goes on.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from schemes import SchemeError

from .space import Candidate
from .store import Result, Store
from .train import Study, train

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
    if not left:
        return
    if workers == 0:
        _check_gpus(study, torch.cuda.device_count())
        results = ((c, trainer(study, c)) for c in left)
    else:
        results = _by_ray(study, left, workers, address, trainer)
    finished = len(candidates) - len(left)
    for candidate, result in results:
        store.add(candidate, result)
        finished += 1
        yield Progress(finished, len(candidates), candidate, result)


def _check_gpus(study: Study, found: float) -> None:
    if study.gpus > found:
        raise SchemeError(f"study.gpus is {study.gpus:g}, and this machine has {found:g} GPUs; 0 trains on the CPU.")


def _by_ray(
    study: Study, left: list[Candidate], workers: int | None, address: str | None, trainer: Trainer
) -> Iterator[tuple[Candidate, Result]]:
    # Ray reports its use to its makers unless it is told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the default to be, which Ray warns about
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError:
        raise SchemeError(
            'several workers need Ray: pip install "odenets[study]"; or train one network at a time: --workers 0.'
        ) from None
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        here = max(1, (os.cpu_count() or 1) // study.threads) if workers is None else workers
        # Results are a line each: the smallest store of objects will do.
        options |= {"num_cpus": here * study.threads, "include_dashboard": False, "object_store_memory": 100 << 20}
    try:
        ray.init(address=address or "local", **options)  # whatever RAY_ADDRESS says
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise SchemeError(f"Ray at {address!r} cannot be used: {str(error).splitlines()[0]}") from None
    try:
        if address is None:  # a cluster may grow; here Ray would wait for ever
            _check_gpus(study, ray.cluster_resources().get("GPU", 0))
        limit = workers if address is not None else None
        yield from _hand_out(ray, RayError, study, left, workers, limit, trainer)
    finally:
        ray.shutdown()


def _hand_out(
    ray: Any,
    ray_error: type[Exception],
    study: Study,
    left: list[Candidate],
    workers: int | None,
    limit: int | None,
    trainer: Trainer,
) -> Iterator[tuple[Candidate, Result]]:
    """Keeps the workers busy, and yields each result when it comes; at most `limit` networks are under way."""
    # A worker that dies is no error of the training: its network is given to another, up to three times.
    task = ray.remote(trainer).options(num_cpus=study.threads, num_gpus=study.gpus, max_retries=3)
    waiting = iter(left)
    flying: dict[Any, Candidate] = {}
    while True:
        # Twice what can run at once, so that no worker waits; counted anew, since a cluster may grow.
        room = workers or max(1, int(ray.cluster_resources().get("CPU", 1) // study.threads))
        while len(flying) < (limit or 2 * room):
            if (candidate := next(waiting, None)) is None:
                break
            flying[task.remote(study, candidate)] = candidate
        if not flying:
            return
        for ready in ray.wait(list(flying), num_returns=1)[0]:
            candidate = flying.pop(ready)
            try:
                result = ray.get(ready)
            except ray_error as error:  # its worker died each time, or lacks something that this process has
                cause = getattr(error, "cause", None)
                text = repr(cause) if cause is not None else str(error).strip().splitlines()[0]
                result = Result("failed", error=text[:500])
            yield candidate, result
