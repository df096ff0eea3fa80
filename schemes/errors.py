"""The one public exception."""


class SchemeError(ValueError):
    """A scheme, a stack or an expression that cannot work as given.

    The message has one or two lines: what was given, what was wanted, and the remedy.
    """


class MixingWarning(UserWarning):
    """A scheme whose stage inputs leave the step's input far behind, over separate weights.

    Filter it with ``warnings.filterwarnings("ignore", category=schemes.MixingWarning)`` where that is meant.
    """
