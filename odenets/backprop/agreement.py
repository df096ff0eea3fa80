"""Decisions shared by the processes of a training run: the first process to decide publishes, the others read.

They go through the key-value store of torch.distributed, where each key is written once. No process waits for another,
so a process that measures alone, or repeatedly, cannot block the run.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from schemes.errors import SchemeError
from schemes.scheme import State

from ..step import Step

_counts: dict[str, int] = {}


def agreed(what: Any, steps: Sequence[Step], state: State, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the decision of the first process to make one; with a single process, its own.

    Args:
        what: names the question.
        steps: the steps that it is about; their shapes tell stacks apart.
        state: their streams, of any batch size.
        decide: returns the decision as plain values.

    Raises:
        SchemeError: the first process raised one.
    """
    store = shared_store()
    if store is None:
        return decide()
    shapes = [(str(step.scheme), tuple(p.numel() for p in step.parameters())) for step in steps]
    like = repr((what, shapes, [tuple(x.shape[1:]) for x in state], state[0].dtype))
    key = "odenets/" + hashlib.sha256(like.encode()).hexdigest()[:24]
    # Each call has its own entry: stacks of equal shape ask in the same order in every process.
    _counts[key] = _counts.get(key, 0) + 1
    try:
        # Plain values, since data from another process must be parsed, never unpickled.
        mine = json.dumps(decide())
    except SchemeError as error:
        mine = json.dumps({"error": str(error)})
    # Sets the key only if it is absent and returns the stored value: the first process wins, and none waits.
    found = json.loads(store.compare_set(f"{key}/{_counts[key]}", "", mine))
    if "error" in found:
        raise SchemeError(found["error"])
    return found


def shared_store() -> Any:
    """The store of torch.distributed, or None unless it is initialised with several processes."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    return dist.distributed_c10d._get_default_store()
