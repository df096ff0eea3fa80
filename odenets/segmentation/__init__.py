"""Segmentation: networks that give each pixel a class, their data, training, evaluation and pictures."""

# First, so that a missing extra is named before anything is imported that it brings.
from ..training import needed as needed

# isort: split
from .augment import SegmentationAugment as SegmentationAugment
from .data import DrawnShapes as DrawnShapes
from .data import Scenes as Scenes
from .data import SegmentationData as SegmentationData
from .inference import Inference as Inference
from .metrics import Overlap as Overlap
from .nets import Mask2Former as Mask2Former
from .nets import SegmentationNet as SegmentationNet
from .nets import UPerNet as UPerNet
from .pictures import PredictedMasks as PredictedMasks
from .segmenter import Segmenter as Segmenter
