"""What a network has learned: features at named places, their similarity, and the pixels that a class depends on."""

from .alignment import Alignment as Alignment
from .alignment import alignment as alignment
from .alignment import unbiased_hsic as unbiased_hsic
from .by_class import ClassAlignment as ClassAlignment
from .by_class import class_alignment as class_alignment
from .features import Features as Features
from .features import evaluating as evaluating
from .features import places as places
from .layercam import layer_cam as layer_cam
from .rank import Rank as Rank
from .rank import feature_rank as feature_rank
from .rank import rank_profile as rank_profile
from .weights import WeightMap as WeightMap
from .weights import weight_maps as weight_maps
