"""The public exception and warning."""


class SchemeError(ValueError):
    """A scheme, a stack or an expression that cannot work as given.

    The message has one or two lines: what was given, what was wanted, and the remedy.
    """


class MixingWarning(UserWarning):
    """A scheme whose stage inputs stray far from the step's input, used with separate weights.

    Filter it with ``warnings.filterwarnings("ignore", category=schemes.MixingWarning)`` where this is intended.
    """
