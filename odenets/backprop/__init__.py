"""Backpropagation through a stack: the walk through its steps, and the modes that run it."""

from .auto import Auto as Auto
from .modes import Checkpoint as Checkpoint
from .modes import Exact as Exact
from .modes import Mode as Mode
from .modes import Offload as Offload
from .modes import Plan as Plan
from .modes import Reverse as Reverse
from .modes import Store as Store
from .modes import format_mode as format_mode
from .modes import parse_mode as parse_mode
from .walk import Pass as Pass
