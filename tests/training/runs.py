"""Training runs as tests need them: a command line in a forked process, or in this one; small nets on the digits."""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts import ROOT as ROOT
from scripts import load

kills = load("experiments/benchmarks/kills.py")


def two_lines(folder: Path, status: int, code: int = 2) -> list[str]:
    """The two lines with which a forked command line ended."""
    text = (folder / "err").read_text()
    lines = text.splitlines()[-2:]
    assert status == code and lines[0].startswith("error: ") and lines[1].startswith("  "), (status, text[-1500:])
    assert "Traceback" not in text, text[-1500:]
    return lines


def run_as_two(function: Callable[..., object], *args: Any) -> None:
    """Calls a function in two processes, as torchrun starts them; both must come to its end."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    children = []
    for rank in range(2):
        if not (child := os.fork()):
            code = 1
            try:
                named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
                os.environ |= {name: str(value) for name, value in named.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
                os.environ["TORCHELASTIC_RUN_ID"] = "pair"
                function(*args)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
