"""Who does the work of a study: this process, processes of this machine, or workers of Ray on one machine or many.

All three take tasks and a function, and yield each task with what the function made of it, as soon as it is there. What
a worker that dies leaves undone is given to another, up to three times; then the task has failed.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, TypeVar

from schemes import SchemeError

from ..messages import first_line

Task = TypeVar("Task")
Outcome = TypeVar("Outcome")
RETRIES = 3  # after the first time
LONGEST = 500  # characters of an error
# How processes begin: from a server that has no locks, files or threads of the one that hands out the work.
START = "forkserver"


def check_gpus(option: str, wanted: float, found: float) -> None:
    """Refuses to wait for GPUs that a machine does not have.

    Args:
        option: the one that asked for them.
        wanted: how many each worker gets.
        found: how many there are.
    """
    if wanted > found:
        raise SchemeError(f"{option} is {wanted:g}, and this machine has {found:g} GPUs; 0 trains on the CPU.")


def here(tasks: Sequence[Task], work: Callable[[Task], Outcome]) -> Generator[tuple[Task, Outcome], None, None]:
    """One after the other, in this process.

    Args:
        tasks: what is to be done.
        work: does one of them.
    """
    # Lazily: each outcome is recorded before the next task begins.
    return ((task, work(task)) for task in tasks)


class _Running(NamedTuple):
    """A process at work.

    Attributes:
        process: so.
        task: what it does.
        deaths: of processes before it that had the same task.
        place: 0 to workers - 1; no two that run have the same.
    """

    process: Any
    task: Any
    deaths: int
    place: int


def by_processes(
    tasks: Sequence[Task],
    work: Callable[[Task], Outcome],
    failed: Callable[[str], Outcome],
    *,
    workers: int,
    prepare: Callable[[int], None] | None = None,
    preload: Sequence[str] = (),
) -> Generator[tuple[Task, Outcome], None, None]:
    """By processes of this machine, a new one for each task, so that no task is touched by another's.

    They are forks of a server that has imported what they need and has done nothing else. Where the consumer stops, or
    an exception comes, they are sent SIGTERM and waited for; where this process is killed, each sends it to itself.

    Args:
        tasks: begun in this order.
        work: what is done with a task; importable by its name.
        failed: makes an outcome of the error of a process that died, or of work that raised.
        workers: processes at a time.
        prepare: called in the process, before the work, with a number below ``workers`` that no other process has at
            the time.
        preload: modules that the server imports.
    """
    context = multiprocessing.get_context(START)
    if START == "forkserver":
        # Otherwise each new process would import torch and Lightning for itself, which takes seconds.
        context.set_forkserver_preload(list(preload))
    waiting: deque[tuple[Task, int]] = deque((task, 0) for task in tasks)
    running: dict[Connection, _Running] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                task, deaths = waiting.popleft()
                # The smallest that is free: places stand for GPUs, and so the work is spread over them.
                place = min(set(range(workers)) - {r.place for r in running.values()})
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_serve, args=(theirs, work, task, prepare, place))
                process.start()
                # The child has its own copy. While this one is open, its death would not end the pipe, and `wait` would
                # wait for ever.
                theirs.close()
                running[ours] = _Running(process, task, deaths, place)
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                ended = running.pop(connection)
                found = _received(connection)
                # Its exit status is known only when it has been waited for.
                ended.process.join()
                if found is None and ended.deaths < RETRIES:
                    # To the front, where it was: tasks are begun in their order.
                    waiting.appendleft((ended.task, ended.deaths + 1))
                    continue
                error, outcome = found or (f"its process ended with status {ended.process.exitcode}", None)
                yield ended.task, failed(error[:LONGEST]) if error else outcome  # type: ignore[misc]
    finally:
        for left in running.values():
            # All are told before any is waited for, so that they save at the same time.
            left.process.terminate()
        for left in running.values():
            left.process.join()


def _received(connection: Connection) -> tuple[str, Any] | None:
    """What a process sent before it ended: an error or "", and an outcome; None where it died without."""
    with connection:
        try:
            return connection.recv()
        except (EOFError, ConnectionError):
            return None


def _serve(connection: Connection, work: Any, task: Any, prepare: Callable[[int], None] | None, place: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until the work has a handler of its own
    os.setsid()  # Ctrl-C is the parent's, which passes on one signal
    threading.Thread(target=_follow_the_parent, daemon=True).start()
    try:
        if prepare is not None:
            prepare(place)
        connection.send(("", work(task)))
    except Exception as error:
        parent = multiprocessing.parent_process()
        if isinstance(error, BrokenPipeError) and parent is not None and not parent.is_alive():
            return  # it was ended first: nobody is left to answer
        traceback.print_exc()
        connection.send((f"{type(error).__name__}: {first_line(error, LONGEST)}", None))


def _follow_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        # A parent that is killed sends no signal to its children: somebody has to wait for its end. Then SIGTERM, and
        # not an exit, since the work may have a handler by now that saves what it has.
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def by_ray(
    tasks: Sequence[Task],
    work: Callable[[Task], Outcome],
    failed: Callable[[str], Outcome],
    *,
    workers: int | None,
    address: str | None,
    threads: int,
    gpus: float,
    option: str,
    otherwise: str,
    fresh: bool = False,
) -> Generator[tuple[Task, Outcome], None, None]:
    """By workers of Ray.

    Args:
        tasks: begun in this order.
        work: what is done with a task.
        failed: makes an outcome of the error of a worker that died each time, or that lacks something.
        workers: so many processes on this machine; with an address at most so many on its machines; None: as many as
            the cores allow.
        address: of a running cluster ("auto" finds it); None starts one on this machine.
        threads: cores of a worker.
        gpus: of a worker; a fraction lets several share one.
        option: the name of that number, for the error.
        otherwise: what to do without Ray, for the error.
        fresh: whether a worker ends after each task, and another takes its place.

    Raises:
        SchemeError: Ray is missing, or not to be reached.
    """
    # Ray reports its use to its makers unless it is told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the default to be, which Ray warns about
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError:
        raise SchemeError(f'several workers need Ray: pip install "odenets[study]"; {otherwise}.') from None
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        own = max(1, (os.cpu_count() or 1) // threads) if workers is None else workers
        # Results are a line each: the smallest store of objects will do.
        options |= {"num_cpus": own * threads, "include_dashboard": False, "object_store_memory": 100 << 20}
    try:
        ray.init(address=address or "local", **options)  # whatever RAY_ADDRESS says
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise SchemeError(f"Ray at {address!r} cannot be used: {first_line(error)}") from None
    try:
        if address is None:  # a cluster may grow; here Ray would wait for ever
            check_gpus(option, gpus, ray.cluster_resources().get("GPU", 0))
        # A worker that dies is no error of the work: its task is given to another.
        each = ray.remote(max_calls=int(fresh))(_call)  # 0 is no limit
        remote = each.options(num_cpus=threads, num_gpus=gpus, max_retries=RETRIES)
        # On this machine Ray runs no more at a time than the cores that it was given; on a cluster it would take all
        # there are.
        limit = workers if address is not None else None
        yield from _hand_out(ray, RayError, remote, tasks, work, failed, workers, limit, threads)
    finally:
        ray.shutdown()


def _call(work: Callable[[Task], Outcome], task: Task) -> Outcome:
    return work(task)


def _hand_out(
    ray: Any,
    ray_error: type[Exception],
    remote: Any,
    tasks: Sequence[Task],
    work: Callable[[Task], Outcome],
    failed: Callable[[str], Outcome],
    workers: int | None,
    limit: int | None,
    threads: int,
) -> Generator[tuple[Task, Outcome], None, None]:
    """Keeps the workers busy, and yields each result when it comes; at most `limit` tasks are under way."""
    waiting = iter(tasks)
    flying: dict[Any, Task] = {}
    while True:
        # Twice what can run at once, so that no worker waits; counted anew, since a cluster may grow.
        room = workers or max(1, int(ray.cluster_resources().get("CPU", 1) // threads))
        while len(flying) < (limit or 2 * room):
            if (task := next(waiting, None)) is None:
                break
            flying[remote.remote(work, task)] = task
        if not flying:
            return
        for ready in ray.wait(list(flying), num_returns=1)[0]:
            task = flying.pop(ready)
            try:
                outcome = ray.get(ready)
            except ray_error as error:  # its worker died each time, or lacks something that this process has
                cause = getattr(error, "cause", None)
                text = repr(cause) if cause is not None else first_line(error)
                outcome = failed(text[:LONGEST])
            yield task, outcome
