"""Numerical schemes for residual networks: the mathematics, without weights or training."""

from . import order as order
from . import stability as stability
from . import tableaux as tableaux
from .adaptive import Adaptive as Adaptive
from .compose import Mix as Mix
from .compose import Nested as Nested
from .compose import Repeat as Repeat
from .compose import Substeps as Substeps
from .errors import MixingWarning as MixingWarning
from .errors import SchemeError as SchemeError
from .registry import catalogue as catalogue
from .registry import get as get
from .registry import names as names
from .registry import register as register
from .runge_kutta import RungeKutta as RungeKutta
from .scheme import Scheme as Scheme
from .scheme import Slot as Slot
from .scheme import solve as solve
from .tableau import Tableau as Tableau
