"""Studies: many networks, trained alike, to compare schemes.

For random networks of one budget, ``space`` draws them, ``net`` builds one, ``train`` trains one, ``engine`` trains
many, and ``report`` compares them. For one experiment, ``comparison`` makes runs for several values and seeds, ``runs``
trains one, and ``comparison_report`` compares them. Both share ``store`` (one row per network), ``workers`` (processes,
or Ray on many machines) and ``statistics``. Training needs the extra ``train``.
"""

from .net import RandomFunction as RandomFunction
from .net import RandomNet as RandomNet
from .space import SPACES as SPACES
from .space import Candidate as Candidate
from .space import Space as Space
from .space import count as count
from .space import sample as sample
