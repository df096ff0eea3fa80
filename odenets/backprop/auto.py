"""Passes whose plan is chosen at the first one; measuring stays out of torch's compiler, which this module loads."""

import torch

from schemes.scheme import State

from .choice import chosen
from .modes import Auto, Plan
from .walk import Pass


@torch.compiler.disable
def plan_for(auto: Auto, given: Pass, state: State) -> Plan:
    """The plan of a stack; see ``choice.chosen``."""
    return chosen(auto, given, state)
