"""Synthetic sentences and their translations, in the layouts that the data module reads."""

from pathlib import Path


def sentences(n: int) -> list[tuple[str, str]]:
    return [(f"sentence {i} is small", f"Satz {i} ist größer") for i in range(n)]


def write_texts(file: Path, n: int, flat: bool = False) -> None:
    """A parquet file with a column per language, or with one column of both, as WMT on the hub."""
    import datasets

    pairs = sentences(n)
    if flat:
        columns: dict = {"en": [s for s, _ in pairs], "de": [t for _, t in pairs]}
    else:
        columns = {"translation": [{"de": t, "en": s} for s, t in pairs]}
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(str(file))
