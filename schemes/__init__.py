"""Numerical schemes for residual networks: the mathematics, without weights or training."""

from . import order as order
from . import stability as stability
from . import tableaux as tableaux
from .adaptive import Adaptive as Adaptive
from .bdia import Bdia as Bdia
from .columns import RevColCoupling as RevColCoupling
from .compose import Mix as Mix
from .compose import Repeat as Repeat
from .compose import Substeps as Substeps
from .coupling import Additive as Additive
from .coupling import Affine as Affine
from .coupling import Coupling as Coupling
from .coupling import MultiLevel as MultiLevel
from .coupling import RevNetCoupling as RevNetCoupling
from .coupling import Update as Update
from .dense import Dense as Dense
from .deprecation import renamed_names as _renamed_names
from .errors import MixingWarning as MixingWarning
from .errors import SchemeError as SchemeError
from .linear import LinearMethod as LinearMethod
from .linear import probe as probe
from .multistep import AdamsBashforth2 as AdamsBashforth2
from .multistep import Alf as Alf
from .multistep import Leapfrog as Leapfrog
from .multistep import LmResNet as LmResNet
from .multistep import Momentum as Momentum
from .multistep import ReversibleHeun as ReversibleHeun
from .nested import Nested as Nested
from .ode import Event as Event
from .ode import Solution as Solution
from .ode import integrate as integrate
from .ode import odeint as odeint
from .registry import catalogue as catalogue
from .registry import examples as examples
from .registry import get as get
from .registry import names as names
from .registry import register as register
from .reversible import Reversible as Reversible
from .runge_kutta import RungeKutta as RungeKutta
from .scheme import Scheme as Scheme
from .scheme import Slot as Slot
from .scheme import solve as solve
from .tableau import Tableau as Tableau

__getattr__ = _renamed_names(__name__, globals(), {"RevCol": "RevColCoupling", "RevNet": "RevNetCoupling"})
