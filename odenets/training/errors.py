"""The error for data that is missing or not as described."""


class DataError(ValueError):
    """Data that is missing or not as described; one or two lines with the remedy."""

    def __init__(self, text: str) -> None:
        # The error of a worker process arrives as text, after a traceback.
        _, caught, rest = str(text).rpartition(f"{type(self).__name__}: ")
        super().__init__(rest.rstrip() if caught and str(text).startswith("Caught ") else text)
