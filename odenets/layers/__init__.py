"""Parts of networks that know nothing of schemes: residual functions, shortcuts, stochastic depth, pooling."""

from .drop_path import DropPath as DropPath
from .drop_path import linear_rates as linear_rates
from .init import init_kaiming as init_kaiming
from .residual import BasicFunction as BasicFunction
from .residual import BottleneckFunction as BottleneckFunction
from .residual import Order as Order
from .scale import ChannelScale as ChannelScale
from .shortcut import PadShortcut as PadShortcut
from .shortcut import Projection as Projection
