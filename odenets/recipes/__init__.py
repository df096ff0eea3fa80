"""Every row of the papers' tables as a configuration: ``odenets recipe NAME`` prints it, ``-c recipe:NAME`` runs it."""

from .data import Data as Data
from .recipe import Paper as Paper
from .recipe import Recipe as Recipe
from .recipe import Row as Row
from .table import PAPERS as PAPERS
from .table import find as find
from .table import names as names
from .table import table as table
from .words import written_out as written_out
