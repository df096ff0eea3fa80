"""Errors under corruptions in one figure: the mean, and mean and relative corruption error against a baseline."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from schemes import SchemeError

from .corruptions import STRENGTHS


class CorruptionErrors(NamedTuple):
    """Errors of a network.

    Attributes:
        clean: On pictures as they are, from 0 to 1.
        errors: Of each corruption, a mean over strengths, or one error per strength.
        strengths: Which.
        frost: "photographs", or "texture" where one stood in for them.
        protocol: Whose constants: "cifar" or "imagenet".
        name: Of the network.
    """

    clean: float
    errors: Mapping[str, float | Sequence[float]]
    strengths: tuple[int, ...] = STRENGTHS
    frost: str = "photographs"
    protocol: str = "imagenet"
    name: str = ""

    def mean(self, name: str) -> float:
        """The error under a corruption, averaged over its strengths."""
        value = self.errors[name]
        return float(value) if isinstance(value, int | float) else sum(value) / len(value)


# Means over the five strengths, published beside the benchmark (github.com/hendrycks/robustness; the same numbers are
# in github.com/google-research/augmix); clean: 43.5 %, the paper's table of ImageNet-C.
ALEXNET = CorruptionErrors(
    0.435,
    {
        "gaussian_noise": 0.886428,
        "shot_noise": 0.894468,
        "impulse_noise": 0.922640,
        "defocus_blur": 0.819880,
        "glass_blur": 0.826268,
        "motion_blur": 0.785948,
        "zoom_blur": 0.798360,
        "snow": 0.866816,
        "frost": 0.826572,
        "fog": 0.819324,
        "brightness": 0.564592,
        "contrast": 0.853204,
        "elastic_transform": 0.646056,
        "pixelate": 0.717840,
        "jpeg_compression": 0.606500,
    },
    name="AlexNet",
)


def corruption_error(found: CorruptionErrors, baseline: CorruptionErrors | None = None) -> dict[str, Any]:
    """Mean error, and against a baseline mCE and relative mCE.

    CE_c = sum_s E_sc / sum_s B_sc; mCE is its mean over corruptions. Relative: sum_s (E_sc - E) / sum_s (B_sc - B), of
    errors E and B on clean pictures. 1 is as good as the baseline.

    Args:
        found: The network's.
        baseline: Another's, under the same corruptions and strengths. Frost is left out of the comparison where one of
            the two had photographs and the other a texture in their place.

    Returns:
        "mean" over all corruptions; with a baseline "baseline", "ce", "relative" (by corruption; None where the
        baseline loses nothing), "mce", "relative_mce", and "left_out".

    Raises:
        SchemeError: The baseline was not corrupted alike.

    Source:
        Hendrycks and Dietterich 2019, arXiv 1903.12261, section 4.

    Example:
        >>> errors = CorruptionErrors(0.1, {"fog": [0.2, 0.4], "snow": [0.3, 0.5]}, (1, 2))
        >>> twice = errors._replace(errors={"fog": [0.4, 0.8], "snow": [0.6, 1.0]})
        >>> round(corruption_error(errors)["mean"], 3), corruption_error(errors, twice)["mce"]
        (0.35, 0.5)
    """
    means = {name: found.mean(name) for name in found.errors}
    summary: dict[str, Any] = {"mean": sum(means.values()) / len(means)}
    if baseline is None:
        return summary
    what = baseline.name or "the baseline"
    missing = [name for name in means if name not in baseline.errors]
    if missing or tuple(found.strengths) != tuple(baseline.strengths) or found.protocol != baseline.protocol:
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
            # None where there is no ratio, and not infinity, which JSON does not have.
            base, lost = baseline.mean(name), baseline.mean(name) - baseline.clean
            ce[name] = means[name] / base if base > 0 else None
            relative[name] = (means[name] - found.clean) / lost if lost > 0 else None
    summary |= {"baseline": what, "ce": ce, "relative": relative, "left_out": left_out}
    summary["mce"], summary["relative_mce"] = _mean(ce), _mean(relative)
    return summary


def _mean(values: Mapping[str, float | None]) -> float | None:
    """None where one of them is: a mean of others would be another figure."""
    known = [v for v in values.values() if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
