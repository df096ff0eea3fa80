"""Residual networks as numerical schemes: the integrator is a part one plugs in."""
