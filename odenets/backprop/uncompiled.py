"""Chooses a plan outside torch's compiler; imported only for mode "auto", since the decorator loads the compiler."""

import torch

from schemes.scheme import State

from .choice import Limits, chosen
from .modes import Plan
from .walk import Pass


@torch.compiler.disable
def plan_for(limits: Limits, given: Pass, state: State) -> Plan:
    """The plan of a stack; see ``choice.chosen``."""
    return chosen(limits, given, state)
