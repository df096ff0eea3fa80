"""The closest known names, for the remedy in an error message."""

from schemes.spelling import closest as closest
