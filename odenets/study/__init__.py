"""Studies: many networks, trained alike, to compare schemes.

Of random networks of one budget, ``space`` draws some, ``net`` builds one, ``train`` trains one, ``engine`` has many
trained, ``report`` compares. Of one experiment, ``comparison`` makes runs for several values and seeds, ``runs`` trains
one, ``comparison_report`` compares. Both share ``store`` (a line for each network), ``workers`` (processes, or Ray on
many machines) and ``statistics``. Training needs the extra ``train``.
"""

from .net import RandomFunction as RandomFunction
from .net import RandomNet as RandomNet
from .space import SPACES as SPACES
from .space import Candidate as Candidate
from .space import Space as Space
from .space import count as count
from .space import sample as sample
