"""Detection on any network: heads, data in COCO's format, average precision, predictions as pictures and results."""

# First, so that a missing extra is named before anything is imported that it brings.
from ..training import needed as needed

# isort: split
from .annotations import Annotations as Annotations
from .data import DetectionData as DetectionData
from .detector import Detector as Detector
from .drawing import draw_detections as draw_detections
from .heads import RTDETR as RTDETR
from .heads import DeformableDETR as DeformableDETR
from .heads import Head as Head
from .precision import AveragePrecision as AveragePrecision
from .precision import Found as Found
from .rcnn import CascadeMaskRCNN as CascadeMaskRCNN
from .rcnn import MaskRCNN as MaskRCNN
from .writer import DetectionFiles as DetectionFiles
