"""Training on pictures with Lightning: the module, the data, augmentation, schedules and callbacks."""

from importlib import import_module
from typing import Any

from schemes.deprecation import warn_renamed

from . import needed as needed

# isort: split
from .augment import Augment as Augment
from .averages import MovingAverage as MovingAverage
from .callbacks import RunSummary as RunSummary
from .callbacks import StepSchedule as StepSchedule
from .callbacks import Throughput as Throughput
from .classifier import Classifier as Classifier
from .data import Digits as Digits
from .data import Images as Images
from .data import Pictures as Pictures
from .refinement import Refinement as Refinement
from .schedules import Constant as Constant
from .schedules import Milestones as Milestones
from .schedules import OneCycle as OneCycle
from .schedules import Poly as Poly
from .schedules import Schedule as Schedule
from .schedules import WarmupCosine as WarmupCosine
from .sources import DataError as DataError
from .supervision import SupervisedClassifier as SupervisedClassifier
from .supervision import SupervisionLoss as SupervisionLoss

# Imported lazily: their packages import this one, and need more dependencies than classification does.
_ELSEWHERE = {"Detector": "odenets.detection", "Segmenter": "odenets.segmentation"}


def __getattr__(name: str) -> Any:
    if name == "Report":  # the name until 0.2; a checkpoint's report is another thing
        warn_renamed("odenets.training.Report", "RunSummary")
        return RunSummary
    if name in _ELSEWHERE:
        return getattr(import_module(_ELSEWHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
