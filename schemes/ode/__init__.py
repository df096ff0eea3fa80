"""Ordinary differential equations: adaptive and fixed steps, dense output, events, gradients."""
