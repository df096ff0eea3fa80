"""Parts of networks that are independent of schemes: residual functions, shortcuts, stochastic depth, pooling."""

from .conv import DepthwiseConv2d as DepthwiseConv2d
from .conv import PatchConv2d as PatchConv2d
from .convnext import ChannelGate as ChannelGate
from .convnext import ConvNeXtFunction as ConvNeXtFunction
from .densenet import DenseFunction as DenseFunction
from .densenet import DenseTransition as DenseTransition
from .drop_path import DropPath as DropPath
from .drop_path import linear_rates as linear_rates
from .init import init_kaiming as init_kaiming
from .init import init_truncated as init_truncated
from .modern import ModernFunction as ModernFunction
from .modern import make_act as make_act
from .modern import make_norm as make_norm
from .norm import LayerNorm2d as LayerNorm2d
from .own_skip import as_residual as as_residual
from .residual import Act as Act
from .residual import BasicFunction as BasicFunction
from .residual import BottleneckFunction as BottleneckFunction
from .residual import Norm as Norm
from .residual import Order as Order
from .scale import ChannelScale as ChannelScale
from .shortcut import PadShortcut as PadShortcut
from .shortcut import PoolPadShortcut as PoolPadShortcut
from .shortcut import Projection as Projection
from .shortcut import SpaceToDepth as SpaceToDepth
from .width import scaled_width as scaled_width
