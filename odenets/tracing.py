"""Detection of proxies, which stand for values in a torch.fx trace."""

import sys
from typing import Any


def is_traced(value: Any) -> bool:
    """Whether a value is a torch.fx proxy, on which every attribute lookup succeeds and which has no truth value."""
    fx = sys.modules.get("torch.fx")  # imported by any code that traces
    return fx is not None and isinstance(value, fx.Proxy)
