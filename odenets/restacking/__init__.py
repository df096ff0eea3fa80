"""Running the residual blocks of an existing model as a stack, in place: ``restack`` and ``unrestack``."""

from .container import Restacked as Restacked
from .container import RestackWarning as RestackWarning
from .surgery import restack as restack
from .surgery import unrestack as unrestack
