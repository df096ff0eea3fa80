"""Alignment against its definition: at any scale, in batches of any size, of any dtype; and what is refused."""

import math
from itertools import permutations

import pytest
import torch
from torch import nn

from odenets.analysis import Alignment, alignment, class_alignment, unbiased_hsic
from schemes import SchemeError


def plain_hsic(x, y):
    """Of raw features, by the sums over different samples, in plain numbers."""
    n = len(x)
    k, m = (x @ x.T).tolist(), (y @ y.T).tolist()
    sums = [0.0, 0.0, 0.0]
    for a, b in permutations(range(n), 2):
        others = [c for c in range(n) if c not in (a, b)]
        sums[0] += k[a][b] * m[a][b] / (n * (n - 1))
        for c in others:
            sums[1] += k[a][b] * m[a][c] / (n * (n - 1) * (n - 2))
            for d in others:
                if d != c:
                    sums[2] += k[a][b] * m[c][d] / (n * (n - 1) * (n - 2) * (n - 3))
    return sums[0] - 2 * sums[1] + sums[2]


def plain_cka(batches):
    """Of batches of (x, y): means of the estimates over all samples, each weighed by its samples."""
    xy, xx, yy = (math.fsum(len(b[0]) * plain_hsic(b[i], b[j]) for b in batches) for i, j in ((0, 1), (0, 0), (1, 1)))
    return xy / math.sqrt(xx * yy)


def features(n, dtype=torch.float64):
    x = torch.randn(n, 3, dtype=torch.float64)
    return x.to(dtype), (x[:, :2] + torch.randn(n, 2, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("sizes", [(8,), (8, 8), (9, 5, 4), (4, 9)])
def test_a_batch_weighs_as_many_as_it_has_samples(sizes):
    batches = [features(n) for n in sizes]
    found = Alignment(["x", "y"])
    for x, y in batches:
        found.update({"x": x, "y": y})
    assert float(found.compute()[0, 1]) == pytest.approx(plain_cka(batches), rel=1e-9)


@pytest.mark.parametrize("scale", [1e-300, 1e-100, 1e-38, 1e-12, 1e-8, 1e8, 1e100, 1e300])
def test_no_scale_is_seen(scale):
    batches = [features(9), features(6)]
    found, scaled = Alignment(["x", "y"]), Alignment(["x", "y"])
    for x, y in batches:
        found.update({"x": x, "y": y})
        scaled.update({"x": scale * x, "y": y / scale})
    torch.testing.assert_close(scaled.compute(), found.compute(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.uint8])
def test_each_precision_is_measured_in_double(dtype):
    x, y = features(8)
    x, y = ((100 + 20 * x).to(dtype), (100 + 20 * y).to(dtype)) if dtype == torch.uint8 else (x.to(dtype), y.to(dtype))
    found = Alignment(["x", "y"])
    found.update({"x": x, "y": y})
    centred = (x.double() - x.double().mean(0), y.double() - y.double().mean(0))
    assert float(found.compute()[0, 1]) == pytest.approx(plain_cka([centred]), rel=1e-9)


def test_a_large_common_part_and_many_columns_change_nothing():
    x, y = features(8)
    wide = torch.randn(8, 2**19 + 7, dtype=torch.float64)  # more columns than are taken at a time
    found = Alignment(["x", "far", "y", "wide"])
    found.update({"x": x, "far": x + 2.0**20, "y": y, "wide": wide})
    matrix, centred = found.compute(), wide - wide.mean(0)
    assert float(matrix[0, 1]) == pytest.approx(1, abs=1e-9)
    assert float(matrix[1, 2]) == pytest.approx(float(matrix[0, 2]), rel=1e-6)
    k, gram = centred @ centred.T, (y - y.mean(0)) @ (y - y.mean(0)).T
    want = unbiased_hsic(k, gram) / (unbiased_hsic(k, k) * unbiased_hsic(gram, gram)).sqrt()
    assert float(matrix[3, 2]) == pytest.approx(float(want), rel=1e-6)


def test_what_does_not_vary_has_no_alignment():
    x, _ = features(12)
    found = Alignment(["x", "same", "zero", "apart"])
    for n in (8, 4):
        part = x[:n]
        same = torch.full((n, 5), 0.1)
        found.update({"x": part, "same": same, "zero": 0 * part, "apart": torch.eye(n)})
    matrix = found.compute()
    assert float(matrix[0, 0]) == pytest.approx(1)
    assert matrix[1:].isnan().all() and matrix[:, 1:].isnan().all()


def test_values_that_are_not_finite_add_nothing():
    x, y = features(6)
    found = Alignment(["x", "y"])
    found.update({"x": x, "y": y})
    before = found.compute()
    with pytest.raises(SchemeError, match="y holds values that are not finite"):
        found.update({"x": x, "y": y / 0})
    assert torch.equal(found.compute(), before)
    with pytest.raises(SchemeError, match="at least 4"):
        unbiased_hsic(torch.ones(3, 3), torch.ones(3, 3))


class Net(nn.Module):
    """Writes into its input, and has a module that never runs."""

    def __init__(self):
        super().__init__()
        self.act, self.input, self.idle, self.ran = nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(2, 2), 0

    def forward(self, x):
        self.ran += 1
        return self.input(self.act(x))


def test_the_row_of_the_input_is_what_was_given():
    x, y = torch.randn(8, 3, 2, 2), torch.arange(8) % 3
    before = x.clone()
    matrix, rows = alignment(Net(), [(x, y.int())], ["act", "input@0"])
    assert torch.equal(x, before) and rows == ["act", "input@0", "input", "label"]
    found = Alignment(rows)
    found.update({"act": x.relu(), "input@0": x.relu(), "input": x, "label": nn.functional.one_hot(y)})
    torch.testing.assert_close(matrix, found.compute())
    soft = torch.randn(8, 4)
    matrix, _ = alignment(Net(), [(x, soft)], ["act"])
    found = Alignment(["act", "label"])
    found.update({"act": x.relu(), "label": soft})
    torch.testing.assert_close(matrix[[0, 2]][:, [0, 2]], found.compute())


@pytest.mark.parametrize(
    "y, classes, message",
    [
        (torch.tensor([0, 1, -1, 1]), None, r"label -1 is no class of 0 to more.\n.*y >= 0"),
        (torch.tensor([0, 1, 3, 1]), 3, "label 3 is no class of 0 to 2"),
        (torch.tensor([0.0, 1, 1, 0]), None, r"labels \(4,\) of torch.float32"),
        (torch.zeros(4, 2, 2), None, "labels"),
    ],
)
def test_labels_that_are_no_class_are_refused_before_the_network_runs(y, classes, message):
    net = Net()
    with pytest.raises(SchemeError, match=message):
        alignment(net, [(torch.randn(4, 3, 2, 2), y)], ["act"], classes=classes)
    assert not net.ran


def test_places_that_do_not_run_or_take_a_name_are_refused():
    batch = (torch.randn(4, 3, 2, 2), torch.arange(4) % 2)
    with pytest.raises(SchemeError, match="idle: the module did not run"):
        alignment(Net(), [batch], ["act", "idle"])
    with pytest.raises(SchemeError, match=r"'input' is the row of the inputs\.\n.*input@0"):
        alignment(Net(), [batch], ["input"])


def test_complex_features_and_batches_that_are_too_small_are_refused():
    x = torch.randn(8, 3, dtype=torch.complex64)
    with pytest.raises(SchemeError, match=r"a is of torch.complex64, want real"):
        Alignment(["a"]).update({"a": x})
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    batch = torch.randn(3, 3, 2, 2), torch.arange(3)
    for call in (lambda: alignment(net, [batch], ["1"]), class_alignment(net, [batch], ["1"], classes=3).best):
        with pytest.raises(SchemeError, match=r"no batch has the 4 samples.*\n  Give larger ones"):
            call()
