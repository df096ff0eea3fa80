"""Values are split at the commas outside of brackets and quotes, and nowhere else."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from odenets.study.values import assignment, folder_name, seeds, split
from schemes import SchemeError

WORDS = st.text("abcXY019 ._+-*/=:", min_size=1, max_size=6).map(str.strip).filter(bool)
QUOTED = st.one_of(
    st.text('ab ,()[]{}"', max_size=6).map("'{}'".format),
    st.text("ab ,()[]{}'", max_size=6).map('"{}"'.format),
    st.just(r'"a \" , b"'),
)


def inside(parts):
    """A word and brackets around some parts: what a value looks like."""
    brackets = st.sampled_from(["()", "[]", "{}"])
    return st.builds(lambda w, b, ps: f"{w}{b[0]}{','.join(ps)}{b[1]}", WORDS, brackets, st.lists(parts, max_size=3))


VALUES = st.recursive(st.one_of(WORDS, QUOTED), inside, max_leaves=6)


@given(values=st.lists(VALUES, min_size=1, max_size=5, unique=True), space=st.sampled_from(["", " "]))
def test_values_that_are_joined_are_split_again(values, space):
    assert split(f"{space},{space}".join(values)) == values


@given(value=VALUES)
def test_one_value_is_whole_however_many_commas_it_has(value):
    assert split(value) == [value]


@given(text=st.text("ab,()[]'\" ", max_size=12))
def test_any_text_is_split_without_loss_or_refused_in_two_lines(text):
    try:
        values = split(text)
    except SchemeError as error:
        assert len(str(error).splitlines()) == 2
        return
    assert [v for v in ",".join(values) if v != " "] == [v for v in text if v != " "]
    for value in values:
        assert split(value) == [value]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,,b", "a comma too many"),
        ("", "no value"),
        ("a,b,a", "the value 'a' twice"),
        ("rk4(a", "missing at the end"),
        ("rk4)a", "closes no bracket"),
        ("[a)", "closes no bracket"),
        ("'a,b", "missing at the end"),
    ],
)
def test_what_is_no_list_of_values(text, said):
    with pytest.raises(SchemeError, match=said):
        split(text)


def test_an_apostrophe_inside_a_word_is_a_letter():
    assert split("don't,won't") == ["don't", "won't"]


@pytest.mark.parametrize("text", ["model.net.scheme", "=a", "a b=c", "a=", "--"])
def test_what_is_no_option_with_values(text):
    with pytest.raises(SchemeError) as error:
        assignment(text)
    assert len(str(error.value).splitlines()) == 2


@given(parts=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), min_size=1, max_size=4))
def test_seeds_are_ranges_with_both_ends(parts):
    want = [seed for low, more in parts for seed in range(low, low + more + 1)]
    assume(len(set(want)) == len(want))
    assert seeds(",".join(f"{low}..{low + more}" if more else str(low) for low, more in parts)) == want


@pytest.mark.parametrize("text", ["", "a", "3..1", "0..", "-1", "0,0", "1..3,2", "1.5", "0..99999999"])
def test_what_is_no_list_of_seeds(text):
    with pytest.raises(SchemeError, match="--seeds") as error:
        seeds(text)
    assert len(str(error.value).splitlines()) == 2


@given(text=st.text(min_size=1, max_size=100))
def test_names_of_folders_need_no_quotes(text):
    name = folder_name(text)
    assert name and name.strip(".-/") == name.strip("/") and not set(name) & set(" /()[]'\"\\*?$") and len(name) < 90
    assert name.isascii() and (len(name) > 80 or folder_name(name) == name)


@given(a=st.text("ab()/[], ", min_size=1), b=st.text("ab()/[], ", min_size=1))
def test_different_texts_have_different_folders(a, b):
    assume(a != b)
    assert folder_name(a) != folder_name(b)
