"""Executors for the work of a study: this process, processes of this machine, or Ray workers on one machine or many.

All three take tasks and a function, and yield each task with the function's result as soon as that is known. If a
worker dies, its task is given to another, up to three times; then the task has failed.
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
RETRIES = 3  # after the first attempt
LONGEST = 500  # characters of an error message
# Start method: fork from a server that has none of the locks, files or threads of the process that hands out the work.
START = "forkserver"


def check_gpus(option: str, wanted: float, found: float) -> None:
    """Refuses to wait for GPUs that a machine does not have.

    Args:
        option: the option that asked for them.
        wanted: GPUs per worker.
        found: GPUs of the machine.
    """
    if wanted > found:
        raise SchemeError(f"{option} is {wanted:g}, and this machine has {found:g} GPUs; 0 trains on the CPU.")


def check_workers(workers: int | None) -> None:
    """Refuses a number of workers below 0, to which no task would be given.

    Args:
        workers: the number; None leaves it open.
    """
    if workers is not None and workers < 0:
        raise SchemeError(f"--workers {workers}: want 0 or more\n  0 trains in this process, one after the other.")


def here(tasks: Sequence[Task], work: Callable[[Task], Outcome]) -> Generator[tuple[Task, Outcome], None, None]:
    """Does tasks one after the other, in this process.

    Args:
        tasks: the tasks.
        work: does one of them.
    """
    # Lazily: each outcome is recorded before the next task begins.
    return ((task, work(task)) for task in tasks)


class _Running(NamedTuple):
    """A process at work.

    Attributes:
        process: the process.
        task: its task.
        deaths: number of earlier processes that died at the same task.
        place: 0 to workers - 1, different for all running processes.
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
    """Does tasks in processes of this machine, a new one for each task, so that tasks do not affect one another.

    The processes are forked from a server that has imported what they need and has done nothing else. If the consumer
    stops or an exception is raised, they are sent SIGTERM and waited for; if this process is killed, each sends SIGTERM
    to itself.

    Args:
        tasks: the tasks, begun in this order.
        work: does a task; importable by its name.
        failed: turns the error of a process that died, or of work that raised, into an outcome.
        workers: number of processes at a time.
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
                # The smallest free one: places stand for GPUs, and this spreads the work over them.
                place = min(set(range(workers)) - {r.place for r in running.values()})
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_serve, args=(theirs, work, task, prepare, place))
                process.start()
                # The child has its own copy. While this one is open, the child's death would not close the pipe, and
                # `wait` would never return.
                theirs.close()
                running[ours] = _Running(process, task, deaths, place)
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                ended = running.pop(connection)
                found = _received(connection)
                # The exit status is known only after the process has been waited for.
                ended.process.join()
                if found is None and ended.deaths < RETRIES:
                    # Back to the front: tasks are begun in order.
                    waiting.appendleft((ended.task, ended.deaths + 1))
                    continue
                error, outcome = found or (f"its process ended with status {ended.process.exitcode}", None)
                yield ended.task, failed(error[:LONGEST]) if error else outcome  # type: ignore[misc]
    finally:
        for left in running.values():
            # All are signalled before any is waited for, so that they save at the same time.
            left.process.terminate()
        for left in running.values():
            left.process.join()


def _received(connection: Connection) -> tuple[str, Any] | None:
    """Returns what a process sent before it ended: an error or "", and an outcome; None if it died without sending."""
    with connection:
        try:
            return connection.recv()
        except (EOFError, OSError):  # an OSError too if it died in the middle of a message
            return None


def _serve(connection: Connection, work: Any, task: Any, prepare: Callable[[int], None] | None, place: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until the work has a handler of its own
    os.setsid()  # Ctrl-C reaches only the parent, which passes on one signal
    threading.Thread(target=_follow_the_parent, daemon=True).start()
    try:
        if prepare is not None:
            prepare(place)
        connection.send(("", work(task)))
    except Exception as error:
        parent = multiprocessing.parent_process()
        if isinstance(error, BrokenPipeError) and parent is not None and not parent.is_alive():
            return  # the parent ended first, and no one is left to report to
        traceback.print_exc()
        connection.send((f"{type(error).__name__}: {first_line(error, LONGEST)}", None))


def _follow_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        # A parent that is killed sends no signal to its children, so this thread waits for its end. Then SIGTERM, not
        # an exit: by now the work may have a handler that saves its progress.
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
    """Does tasks in Ray workers.

    Args:
        tasks: the tasks, begun in this order.
        work: does a task.
        failed: turns the error of a worker that died on every attempt, or that lacks something, into an outcome.
        workers: number of processes on this machine, or with an address the most on its machines; None: as many as the
            cores allow.
        address: address of a running cluster ("auto" finds it); None starts one on this machine.
        threads: cores per worker.
        gpus: GPUs per worker; a fraction lets several share one.
        option: the name of the option for ``gpus``, for the error.
        otherwise: what to do without Ray, for the error.
        fresh: whether a worker ends after each task and is replaced.

    Raises:
        SchemeError: Ray is missing, or cannot be reached.
    """
    # Ray sends usage statistics to its makers unless it is told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the future default, which Ray warns about
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError:
        raise SchemeError(f'several workers need Ray: pip install "odenets[study]"; {otherwise}.') from None
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        own = max(1, (os.cpu_count() or 1) // threads) if workers is None else workers
        # Each result is one row: the smallest object store will do.
        options |= {"num_cpus": own * threads, "include_dashboard": False, "object_store_memory": 100 << 20}
    try:
        ray.init(address=address or "local", **options)  # whatever RAY_ADDRESS says
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise SchemeError(f"Ray at {address!r} cannot be used: {first_line(error)}") from None
    try:
        if address is None:  # a cluster may grow; on this machine Ray would wait forever
            check_gpus(option, gpus, ray.cluster_resources().get("GPU", 0))
        # A worker's death is not an error of the work: its task is given to another.
        each = ray.remote(max_calls=int(fresh))(_call)  # 0: no limit
        remote = each.options(num_cpus=threads, num_gpus=gpus, max_retries=RETRIES)
        # On this machine Ray runs no more tasks at a time than its cores allow; on a cluster it would take all cores
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
    """Keeps the workers busy, and yields each result when it arrives; at most `limit` tasks are under way."""
    waiting = iter(tasks)
    flying: dict[Any, Task] = {}
    while True:
        # Twice what can run at once, so that no worker idles; counted anew, since a cluster may grow.
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
            except ray_error as error:  # its worker died on every attempt, or lacks something that this process has
                cause = getattr(error, "cause", None)
                text = repr(cause) if cause is not None else first_line(error)
                outcome = failed(text[:LONGEST])
            yield task, outcome
