"""Property tests to import: hypothesis strategies for schemes, and laws that a scheme obeys.

A law is a function that raises AssertionError where a scheme breaks it, so a new scheme is tested in one line each:

    @given(schemes.testing.scheme_expressions())
    def test_mine(text): ...

    schemes.testing.check_order(my_scheme)

Needs hypothesis (the extra ``testing``); nothing else in ``schemes`` imports this package.
"""

# ``registration`` comes before the modules that import hypothesis, which may call it during its own import; see there.
from .laws import check_expression as check_expression
from .laws import check_formula as check_formula
from .laws import check_order as check_order
from .laws import check_round_trip as check_round_trip
from .laws import check_slots as check_slots
from .laws import check_stack as check_stack
from .laws import observed_order as observed_order
from .laws import residual_functions as residual_functions
from .registration import register as register

from .check import check_scheme as check_scheme  # isort: skip
from .check import check_wrappers as check_wrappers  # isort: skip
from .reversible import check_amplification as check_amplification
from .reversible import check_declared as check_declared
from .reversible import check_inverse as check_inverse
from .reversible import check_updates as check_updates
from .reversible import couplings as couplings
from .reversible import states as states
from .strategies import scheme_expressions as scheme_expressions
from .strategies import schemes as schemes
from .strategies import tableaux as tableaux
from .wrappers import check_attributes as check_attributes
from .wrappers import check_wrapper as check_wrapper
