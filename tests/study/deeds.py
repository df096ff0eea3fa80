"""What workers are given to do; few imports, as each process makes them."""

import os
import signal
import time
from pathlib import Path


def square(n):
    return n * n


def die(task):
    """Kills its process as often as the task says, then returns how often it was begun."""
    file, deaths = task
    with open(file, "a") as log:
        log.write("x")
    begun = len(Path(file).read_text())
    if begun <= deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return begun


def complain(task):
    raise ValueError(f"no {task}\nand more")


def sleep(file):
    Path(file).write_text(str(os.getpid()))
    time.sleep(600)


def place(task):
    time.sleep(0.05)
    return os.environ["PLACE"]


def take_place(number):
    os.environ["PLACE"] = str(number)


def sleep_or_square(task):
    return sleep(task) if isinstance(task, str) else square(task)
