"""Residual networks as numerical schemes: the integrator is a part one plugs in."""

from schemes.errors import MixingWarning as MixingWarning
from schemes.errors import SchemeError as SchemeError

from .continuous import ContinuousWeights as ContinuousWeights
from .layers import as_residual as as_residual
from .models import create_model as create_model
from .models import list_models as list_models
from .planning import plan as plan
from .restacking import Restacked as Restacked
from .restacking import RestackWarning as RestackWarning
from .restacking import restack as restack
from .restacking import unrestack as unrestack
from .stack import Stack as Stack
from .step import PerSlot as PerSlot

__version__ = "0.2.0"
