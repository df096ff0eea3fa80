"""Errors of a trained network on pictures that are corrupted, attacked, or of another size."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from schemes import SchemeError

from ..evaluation.attacks import Attack
from ..evaluation.corruption_error import ALEXNET, CorruptionErrors, corruption_error
from ..evaluation.corruptions import KINDS, STRENGTHS, corrupt, protocol_of
from ..messages import first_line
from .judge import wilson
from .labelled import Labelled, levels_of
from .sources import DataError
from .trained import Trained

Progress = Callable[[int], None]


def corruption_figures(
    trained: Trained,
    pictures: Labelled,
    names: Sequence[str] = tuple(KINDS),
    strengths: Sequence[int] = STRENGTHS,
    seed: int = 0,
    frost: Sequence[Tensor] = (),
    baseline: CorruptionErrors | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures the errors of a network under common corruptions of pictures, applied at the size that it sees.

    Args:
        trained: The network.
        pictures: Labelled pictures.
        names: Of the corruptions.
        strengths: Of each.
        seed: Of all random numbers; those of a picture depend on its number, not on its batch.
        frost: Photographs, see ``corrupt``.
        baseline: Errors of another network, for mean and relative corruption error.
        batch_size: Pictures that go through the network together.
        num_workers: Processes that decode.
        progress: Called with the number of pictures that are done.

    Returns:
        "clean", "errors" (by corruption, one per strength), "strengths", "frost", "protocol", and the result of
        ``corruption_error`` for them.

    Raises:
        DataError: No picture can be read.
        SchemeError: The baseline was corrupted differently; raised before any picture is corrupted.
    """
    height, width = trained.view.height, trained.view.width
    kind = "photographs" if frost else "texture"
    about = {"strengths": tuple(strengths), "frost": kind, "protocol": protocol_of(height, width)}
    # A trial with errors of 0, so that a baseline that does not fit is refused before hours are spent.
    corruption_error(CorruptionErrors(0.0, dict.fromkeys(names, 0.0), **about), baseline)
    wrong = {(name, strength): 0 for name in names for strength in strengths}
    clean = count = 0
    for numbers, x, labels in pictures.batches(batch_size, num_workers):
        levels, count = levels_of(x), count + len(labels)
        clean += _wrong(trained, levels, labels)
        for name, strength in wrong:
            corrupted = corrupt(levels, name, strength, numbers, seed, frost=frost)
            wrong[name, strength] += _wrong(trained, corrupted, labels)
        if progress is not None:
            progress(count)
    if not count:
        raise DataError(f"{pictures.where}: none of its pictures can be read\n  Replace the files")
    errors = {name: [wrong[name, s] / count for s in strengths] for name in names}
    found = CorruptionErrors(clean / count, errors, **about)
    plain = {**found._asdict(), "name": str(trained.path), "strengths": list(strengths), "pictures": count}
    return {**plain, "data": pictures.where, "seed": seed, **corruption_error(found, baseline)}


def _wrong(trained: Trained, x: Tensor, labels: Tensor) -> int:
    return int((trained.probabilities(x).argmax(1) != labels).sum())


def read_baseline(text: str) -> CorruptionErrors:
    """Reads a baseline's errors: ``alexnet``, as published, or a file of `odenets evaluate --corruptions --output`.

    Args:
        text: the name, or the path of the file.

    Raises:
        DataError: There is no such file, or it holds no errors under corruptions.
    """
    if text.lower() == "alexnet":
        return ALEXNET
    try:
        held = json.loads(Path(text).read_text(encoding="utf-8"))
        # The file of a whole evaluation, or only its part on corruptions.
        held = held.get("corruptions", held)
        errors = {str(k): [float(e) for e in v] for k, v in held["errors"].items()}
        strengths = tuple(int(s) for s in held["strengths"])
        if not errors or any(len(row) != len(strengths) for row in errors.values()):
            raise ValueError("an error per strength is wanted")
        return CorruptionErrors(float(held["clean"]), errors, strengths, held["frost"], held["protocol"], text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise DataError(
            f"--baseline {text} holds no errors under corruptions ({type(e).__name__}: {str(e)[:80]})\n"
            "  odenets evaluate CKPT --corruptions --output FILE.json writes one; alexnet has published errors"
        ) from None


def read_frost(folder: str | Path) -> list[Tensor]:
    """Reads photographs of frost, in the order of their names: uint8 (3, h, w).

    Args:
        folder: With ``frost1.png`` ... ``frost6.jpg`` as published by the benchmark's authors.

    Raises:
        DataError: There are none, or one cannot be read.
    """
    from .decode import Picture, Unreadable
    from .layout import PICTURES

    root = Path(folder)
    files = sorted(p for p in root.iterdir() if p.suffix.lower() in PICTURES) if root.is_dir() else []
    if not files:
        raise DataError(f"--frost {folder}: there is no photograph in it\n  Leave it out: a texture stands in for them")
    try:
        return [Picture(str(path)).whole().permute(2, 0, 1) for path in files]
    except Unreadable as e:
        raise DataError(f"--frost {folder}: {e}\n  Leave it out: a texture stands in for them") from None


def attack_figures(
    trained: Trained,
    pictures: Labelled,
    attacks: Sequence[Attack],
    confidence: float = 0.95,
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Measures the accuracy of a network under white-box attacks.

    Args:
        trained: The network.
        pictures: Labelled pictures.
        attacks: Each is applied to all pictures.
        confidence: Of the intervals.
        seed: Of random starts; those of a picture depend on its number, not on its batch.
        batch_size: Pictures that are attacked together.
        num_workers: Processes that decode.
        progress: Called with the number of pictures that are done.

    Returns:
        For each attack its name, "pictures", "accuracy" with its interval, and "farthest", the largest distance of an
        attacked picture from the original, in the attack's norm.

    Raises:
        DataError: No picture can be read.
        SchemeError: Logits or gradients that are not finite.
    """
    device = next(trained.net.parameters()).device
    right, farthest, count = [0] * len(attacks), [0.0] * len(attacks), 0
    for numbers, x, labels in pictures.batches(batch_size, num_workers):
        x = (x / 255 if x.dtype == torch.uint8 else x).to(device)
        labels, count = labels.to(device), count + len(labels)
        for k, attack in enumerate(attacks):
            # One seed per picture; runs with different seeds have none in common.
            moved = attack(trained.logits, x, labels, [seed * 2**32 + i for i in numbers])
            with torch.no_grad():
                right[k] += int((trained.logits(moved).argmax(1) == labels).sum())
            order = float("inf") if attack.norm == "linf" else 2
            farthest[k] = max(farthest[k], float(torch.linalg.vector_norm((moved - x).flatten(1), order, 1).max()))
        if progress is not None:
            progress(count)
    if not count:
        raise DataError(f"{pictures.where}: none of its pictures can be read\n  Replace the files")
    return [
        {
            "attack": attack.name,
            "pictures": count,
            "accuracy": {"value": right[k] / count, "interval": list(wilson(right[k], count, confidence))},
            "farthest": farthest[k],
        }
        for k, attack in enumerate(attacks)
    ]


def size_figures(
    trained: Trained,
    sizes: Sequence[int],
    root: str | Path | None = None,
    split: str | None = None,
    confidence: float = 0.95,
    limit: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
) -> list[dict[str, Any]]:
    """Measures accuracy against the size of the pictures; the visible share of a picture stays the same.

    Args:
        trained: The network.
        sizes: Sides in pixels.
        root: Folder of pictures; None takes the data of the checkpoint.
        split: Of them.
        confidence: Of the intervals.
        limit: Largest number of pictures, evenly spread; None takes all.
        batch_size: Pictures that go through the network together.
        num_workers: Processes that decode.

    Returns:
        For each size "size", "pictures", "accuracy" with its interval.

    Raises:
        SchemeError: A size that the network does not take; raised before any picture is read.
        DataError: Data of one fixed size, or no picture that can be read.
    """
    device = next(trained.net.parameters()).device
    for size in sizes:
        try:
            trained.probabilities(torch.zeros(1, trained.view.channels, size, size, dtype=torch.uint8, device=device))
        except (RuntimeError, ValueError) as e:
            raise SchemeError(
                f"--sizes {size}: the network does not take it: {first_line(e)}\n  Give other sizes."
            ) from None
    found = []
    for size in sizes:
        pictures, right, count = Labelled(trained, root, split, size, limit), 0, 0
        for _, x, labels in pictures.batches(batch_size, num_workers):
            right, count = right + len(labels) - _wrong(trained, x, labels), count + len(labels)
        if not count:
            raise DataError(f"{pictures.where}: none of its pictures can be read\n  Replace the files")
        accuracy = {"value": right / count, "interval": list(wilson(right, count, confidence))}
        found.append({"size": size, "pictures": count, "accuracy": accuracy})
    return found
