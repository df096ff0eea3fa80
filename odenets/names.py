"""The closest of known names, for the remedy of an error."""

from schemes.names import closest as closest
