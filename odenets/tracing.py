"""Whether a value stands for another one in a trace of torch.fx."""

import sys
from typing import Any


def is_traced(value: Any) -> bool:
    """Whether it is a proxy of torch.fx, which has every attribute that it is asked for and no truth value."""
    fx = sys.modules.get("torch.fx")  # whoever traces has imported it
    return fx is not None and isinstance(value, fx.Proxy)
