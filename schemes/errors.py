"""The one public exception."""


class SchemeError(ValueError):
    """A scheme, a stack or an expression that cannot work as given.

    The message has one or two lines: what was given, what was wanted, and the remedy.
    """
