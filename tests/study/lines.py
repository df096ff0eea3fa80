"""The lines of a study that never ran."""

import math

from odenets.study.space import SPACES, sample


def made_up_lines(per_kind=6, schemes=("euler", "dense"), gain=0.05):
    """Lines as ``read`` gives them, with accuracies that follow a formula: concatenation gains."""
    found = []
    for c in sample(SPACES["mini"], schemes, per_kind, size=32, classes=50):
        accuracy = 0.2 + 0.01 * math.sin(c.number) + gain * (c.scheme == "dense")
        widths = [c.width * (n + 1 if c.scheme == "dense" else 1) for n in range(c.depth + 1)]
        line = {**vars(c), "status": "trained", "accuracy": accuracy, "loss": 1 - accuracy, "seconds": 1.0}
        found.append({**line, "kept_mib": 2.0, "ranks": [(w, w - 1, w / 2) for w in widths]})
    return found
