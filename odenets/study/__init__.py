"""Studies over random networks: equally budgeted networks from a design space, trained alike, to compare schemes.

``space`` draws networks, ``net`` builds one, ``train`` trains one, ``engine`` has many trained (here, or by Ray on many
machines), ``store`` keeps one line for each, ``report`` compares. Training needs the extra ``train``.
"""

from .net import RandomFunction as RandomFunction
from .net import RandomNet as RandomNet
from .space import SPACES as SPACES
from .space import Candidate as Candidate
from .space import Space as Space
from .space import count as count
from .space import sample as sample
