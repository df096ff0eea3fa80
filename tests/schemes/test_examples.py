"""The laws, for every scheme that is there: each registered name and each class brings its examples."""

import pytest

import schemes
from schemes.testing import check_scheme, check_wrappers

EXAMPLES = schemes.examples()


@pytest.mark.parametrize("text", EXAMPLES)
def test_laws(text):
    check_scheme(text)


@pytest.mark.parametrize(
    "text", [t for t in EXAMPLES if schemes.get(t).nodes is not None and schemes.get(t).stages < 9]
)
def test_a_wrapper_is_what_it_stands_around(text):
    check_wrappers(text)
