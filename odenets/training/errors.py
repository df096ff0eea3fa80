"""The error of data that is missing or does not look as told."""


class DataError(ValueError):
    """Data that is missing or does not look as told; one or two lines with the remedy."""

    def __init__(self, text: str) -> None:
        # A worker process hands its error over as text, with a traceback before it.
        _, caught, rest = str(text).rpartition(f"{type(self).__name__}: ")
        super().__init__(rest.rstrip() if caught and str(text).startswith("Caught ") else text)
