"""Training on pictures with Lightning: the module, the data, augmentation, schedules and callbacks."""

from .augment import Augment as Augment
from .callbacks import Report as Report
from .callbacks import StepSchedule as StepSchedule
from .callbacks import Throughput as Throughput
from .classifier import Classifier as Classifier
from .data import Digits as Digits
from .data import Images as Images
from .data import Pictures as Pictures
from .schedules import Constant as Constant
from .schedules import Milestones as Milestones
from .schedules import OneCycle as OneCycle
from .schedules import Schedule as Schedule
from .schedules import WarmupCosine as WarmupCosine
from .sources import DataError as DataError
from .supervision import SupervisedClassifier as SupervisedClassifier
from .supervision import SupervisionLoss as SupervisionLoss
