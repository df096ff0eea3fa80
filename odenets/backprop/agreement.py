"""What the processes of a training run decide as one: the first to decide writes it down, the others read it.

Through the key-value store of torch.distributed, where a key is written once: nobody waits for anybody, so that a
process that measures alone, or again, stops nothing.
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
    """What the process decided that was the first to do so; the own decision where there is but one process.

    Args:
        what: names the question.
        steps: those that it is about; their shapes tell stacks apart.
        state: their streams, of any batch size.
        decide: gives plain values.

    Raises:
        SchemeError: the first process raised one.
    """
    store = shared_store()
    if store is None:
        return decide()
    shapes = [(str(step.scheme), tuple(p.numel() for p in step.parameters())) for step in steps]
    like = repr((what, shapes, [tuple(x.shape[1:]) for x in state], state[0].dtype))
    key = "odenets/" + hashlib.sha256(like.encode()).hexdigest()[:24]
    # Stacks of one shape ask in the same order in every process.
    _counts[key] = _counts.get(key, 0) + 1
    try:
        # Plain values: what comes from another process is parsed, and never unpickled.
        mine = json.dumps(decide())
    except SchemeError as error:
        mine = json.dumps({"error": str(error)})
    # Writes where nothing is, and returns what is there then: the first process wins, and none waits.
    found = json.loads(store.compare_set(f"{key}/{_counts[key]}", "", mine))
    if "error" in found:
        raise SchemeError(found["error"])
    return found


def shared_store() -> Any:
    """The store of torch.distributed, where it is initialised and there are several processes."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    return dist.distributed_c10d._get_default_store()
