"""Models: ``create_model(name)``, or the classes themselves."""

from . import named as named
from . import zoo as zoo
from . import zoo_reversible as zoo_reversible
from .convnext import ConvNeXt as ConvNeXt
from .densenet import DenseNet as DenseNet
from .rdnet import RDNet as RDNet
from .registry import Weights as Weights
from .registry import create_model as create_model
from .registry import list_models as list_models
from .registry import published_weights as published_weights
from .registry import register_model as register_model
from .resnet import HOResNet as HOResNet
from .resnet import ResNet as ResNet
from .revcol import RevCol as RevCol
from .revcol import Supervised as Supervised
from .revcol_keys import pad_kernels as pad_kernels
