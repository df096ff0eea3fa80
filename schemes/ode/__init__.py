"""Ordinary differential equations: adaptive and fixed steps, dense output, events, gradients."""

from .events import Event as Event
from .events import Found as Found
from .interface import integrate as integrate
from .interface import odeint as odeint
from .interface import odeint_adjoint as odeint_adjoint
from .interface import odeint_dense as odeint_dense
from .interface import odeint_event as odeint_event
from .solution import Solution as Solution
