"""Imported before the rest of this package: raises an error that names what is not installed, if anything is not."""

from ..extras import require

require("train", "odenets.training")
