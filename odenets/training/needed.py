"""Imported before all others of this package: says what is not installed, where something is not."""

from ..extras import require

require("train", "odenets.training")
