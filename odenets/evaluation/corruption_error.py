"""Summaries of errors under corruptions: their mean, and the mCE and relative mCE against a baseline."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

from schemes import SchemeError

from .corruptions import STRENGTHS


class CorruptionErrors(NamedTuple):
    """Errors of a network under corruptions.

    Attributes:
        clean: Error on pictures as they are, from 0 to 1.
        errors: For each corruption, a mean over strengths, or one error per strength.
        strengths: The strengths.
        frost: "photographs", or "texture" if one was used in their place.
        protocol: Whose constants: "cifar" or "imagenet".
        name: Name of the network.
    """

    clean: float
    errors: Mapping[str, float | Sequence[float]]
    strengths: tuple[int, ...] = STRENGTHS
    frost: str = "photographs"
    protocol: str = "imagenet"
    name: str = ""

    def mean(self, name: str, strengths: Sequence[int] | None = None) -> float:
        """Returns the error under a corruption, averaged over its strengths, or over some of them.

        Raises:
            SchemeError: it has several errors, but not one for each strength.
        """
        value = self.errors[name]
        if isinstance(value, int | float | Real):
            return float(value)
        if not len(value) or len(value) != len(self.strengths):
            raise SchemeError(
                f"{name} has {len(value)} errors, for strengths {', '.join(map(str, self.strengths))}\n"
                "  Give one for each, or their mean."
            )
        at = self.strengths if strengths is None else strengths
        return float(sum(value[self.strengths.index(s)] for s in at) / len(at))

    def has(self, strengths: Sequence[int]) -> bool:
        """Whether errors at these strengths are known; from means over all strengths, no part is."""
        if any(isinstance(value, int | float | Real) for value in self.errors.values()):
            return set(strengths) == set(self.strengths)
        return set(strengths) <= set(self.strengths)


# At strengths 1 to 5 (github.com/hendrycks/robustness, issue 10; their means are those in github.com/google-research/
# augmix). Clean: that of torchvision's weights, which were used there (issue 38), 56.522 % top-1 by its documentation.
ALEXNET = CorruptionErrors(
    0.43478,
    {
        "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
        "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
        "impulse_noise": (0.78374, 0.89808, 0.9487, 0.9872, 0.99548),
        "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
        "glass_blur": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
        "motion_blur": (0.5843, 0.70048, 0.82108, 0.8975, 0.92638),
        "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
        "snow": (0.71726, 0.88392, 0.86468, 0.9187, 0.94952),
        "frost": (0.6139, 0.79734, 0.8879, 0.89942, 0.9343),
        "fog": (0.67474, 0.7605, 0.84378, 0.8726, 0.945),
        "brightness": (0.4514, 0.48502, 0.54048, 0.62166, 0.7244),
        "contrast": (0.64548, 0.7615, 0.88874, 0.9776, 0.9927),
        "elastic_transform": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
        "pixelate": (0.52218, 0.5462, 0.73728, 0.87092, 0.91262),
        "jpeg_compression": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
    },
    name="AlexNet",
)


def corruption_error(found: CorruptionErrors, baseline: CorruptionErrors | None = None) -> dict[str, Any]:
    """Returns the mean error and, against a baseline, mCE and relative mCE.

    CE_c = sum_s E_sc / sum_s B_sc; mCE is its mean over corruptions. Relative: sum_s (E_sc - E) / sum_s (B_sc - B),
    with errors E and B on clean pictures. 1 is as good as the baseline.

    Args:
        found: The network's errors.
        baseline: Another network's errors, under at least these corruptions and strengths. Frost is left out of the
            comparison if one of the two had photographs and the other a texture in their place.

    Returns:
        "mean" over all corruptions; with a baseline "baseline", "ce", "relative" (by corruption; None where the
        baseline loses nothing), "mce", "relative_mce", and "left_out".

    Raises:
        SchemeError: There are no errors, or not one for each strength, or the baseline was corrupted differently.

    Source:
        Hendrycks and Dietterich 2019, arXiv 1903.12261, section 4.

    Example:
        >>> errors = CorruptionErrors(0.1, {"fog": [0.2, 0.4], "snow": [0.3, 0.5]}, (1, 2))
        >>> twice = errors._replace(errors={"fog": [0.4, 0.8], "snow": [0.6, 1.0]})
        >>> round(corruption_error(errors)["mean"], 3), corruption_error(errors, twice)["mce"]
        (0.35, 0.5)
    """
    if not found.errors:
        raise SchemeError("corruption_error: there is no corruption\n  Give errors under one or more.")
    means = {name: found.mean(name) for name in found.errors}
    summary: dict[str, Any] = {"mean": sum(means.values()) / len(means)}
    if baseline is None:
        return summary
    what = baseline.name or "the baseline"
    missing = [name for name in means if name not in baseline.errors]
    if missing or not baseline.has(found.strengths) or found.protocol != baseline.protocol:
        mine, other = (f"strengths {', '.join(map(str, e.strengths))}, {e.protocol}" for e in (found, baseline))
        lacks = f"has no {missing[0]}" if missing else f"is of {other}"
        raise SchemeError(
            f"--baseline: {what} {lacks}, the network's errors are of {mine}\n  Corrupt both alike: the same options."
        )
    left_out = ["frost"] if "frost" in means and found.frost != baseline.frost else []
    ce: dict[str, float | None] = {}
    relative: dict[str, float | None] = {}
    for name in means:
        if name not in left_out:
            # None if there is no ratio; not infinity, which JSON lacks.
            base = baseline.mean(name, found.strengths)
            lost = base - baseline.clean
            ce[name] = means[name] / base if base > 0 else None
            relative[name] = (means[name] - found.clean) / lost if lost > 0 else None
    summary |= {"baseline": what, "ce": ce, "relative": relative, "left_out": left_out}
    summary["mce"], summary["relative_mce"] = _mean(ce), _mean(relative)
    return summary


def _mean(values: Mapping[str, float | None]) -> float | None:
    """The mean; None if a value is None, since the mean of the others would be a different figure."""
    known = [v for v in values.values() if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
