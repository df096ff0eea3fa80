"""Numerical schemes for residual networks: the mathematics, without weights or training."""

from .errors import SchemeError as SchemeError
