"""Dense concatenation: order of the streams, growth, and an inverse that is exact and free."""

import torch

import schemes
from schemes.testing.reversible import run, smooth_functions


def test_the_function_sees_the_input_first_and_the_newest_last():
    x, given = torch.ones(1, 2), []

    def f(s):
        given.append(s)
        return torch.full((1, 1), float(len(given)) + 1)

    dense = schemes.get("dense(1)")
    state = dense.init((f,), x)
    for _ in range(3):
        state = dense.step((f,), state)
    assert given[2].tolist() == [[1, 1, 2, 3]]
    assert dense.readout(state).tolist() == [[1, 1, 2, 3, 4]]


def test_widths_grow_by_one_stream_a_step():
    dense = schemes.get("dense(growth=12)")
    assert dense.streams_added == 1 and dense.amplification == 1.0
    streams = dense.stream_widths(24)
    for n in range(3):
        (slot,) = dense.slots(n, streams)
        assert slot.in_channels == (24 + 12 * n,) and slot.out_channels == 12
        streams = dense.widths(n, streams)
    assert streams == (24, 12, 12, 12)
    assert dense.shape_of(0, (torch.Size((2, 24, 5, 5)),)) == (2, 12, 5, 5)


def test_the_inverse_is_exact_and_calls_nothing():
    dense, x = schemes.get("dense(3)"), torch.randn(2, 4, 5, dtype=torch.float64)
    fs = smooth_functions(dense, 4, 6)
    found = run(dense, fs, x)
    calls = [f.calls for (f,) in fs]
    state = found[-1]
    for n in reversed(range(6)):
        state = dense.inverse(fs[n], state)
        assert all(a is b for a, b in zip(state, found[n], strict=True))
    assert [f.calls for (f,) in fs] == calls == [1] * 6


def test_another_dimension():
    dense = schemes.get("dense(2, dim=-1)")
    (x, y) = dense.step((lambda s: s[..., :2],), (torch.ones(2, 5, 3),))
    assert dense.readout((x, y)).shape == (2, 5, 5)
    assert dense.shape_of(0, (x.shape,)) == (2, 5, 2)
