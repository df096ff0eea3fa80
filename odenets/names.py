"""The closest of known names, for the remedy of an error."""

from schemes.spelling import closest as closest
