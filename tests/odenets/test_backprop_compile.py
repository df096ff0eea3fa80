"""Reversible backpropagation and torch.compile: of the residual functions, and of the whole stack."""

import pytest
import torch
from invertible import CHANNELS, batch, build, distance, gradients, peak
from torch import Tensor, nn

from odenets import Stack

FEW = pytest.mark.parametrize("name", ["revnet", "momentum(0.9)", "revcol, learned", "reversible_heun"])
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # Dynamo looks at the gradient of every tensor that enters a graph.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # Torch 2.11 tells of the profiler that measures the memory.
    pytest.mark.filterwarnings("ignore:.*[Pp]rofiler:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.long
@FEW
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_functions(name: str, backend: str) -> None:
    reverse, store = build(name, 3, norm=True), build(name, 3, norm=True, backprop="store")
    for step in reverse.steps:
        for f in step.fs:  # type: ignore[union-attr]
            f.compile(backend=backend)
    for _ in range(2):
        got, want = gradients(reverse, batch()), gradients(store, batch())
    assert distance(got, want) <= 1e-10
    theirs = dict(store.named_buffers())
    assert all(torch.allclose(b, theirs[k]) for k, b in reverse.named_buffers())


@pytest.mark.long
@FEW
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_stack(name: str, backend: str) -> None:
    """Reverse mode breaks the graph and runs its steps as they are; stored mode is one graph."""
    reverse, store = build(name, 3), build(name, 3, backprop="store")
    compiled = torch.compile(reverse, backend=backend)
    reverse(batch())
    got = gradients(reverse, batch())
    reverse.zero_grad()
    x = batch()
    compiled(x).square().mean().backward()
    mine = {**{k: p.grad for k, p in reverse.named_parameters()}, "input": x.grad}
    assert distance(mine, got) <= 1e-12
    store(batch())
    whole = torch.compile(store, backend=backend, fullgraph=True)
    store.zero_grad()
    x = batch()
    whole(x).square().mean().backward()
    assert distance({**{k: p.grad for k, p in store.named_parameters()}, "input": x.grad}, got) <= 1e-10


@pytest.mark.long
def test_graph_breaks_are_two_at_most() -> None:
    reverse = build("revnet", 3)
    reverse(batch())
    explanation = torch._dynamo.explain(reverse)(batch())
    assert explanation.graph_break_count <= 2
    store = build("revnet", 3, backprop="store")
    store(batch())
    assert torch._dynamo.explain(store)(batch()).graph_break_count == 0


class Smooth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(CHANNELS // 2, 4), nn.Linear(4, CHANNELS // 2)

    def forward(self, x: Tensor) -> Tensor:
        return 0.3 * self.outer(torch.tanh(self.inner(x)))


@pytest.mark.long
@pytest.mark.parametrize("whole", [False, True])
def test_memory_stays_flat(whole: bool) -> None:
    peaks = []
    for depth in (3, 9):
        torch.manual_seed(0)
        fs = [Smooth() for _ in range(2 * depth)]
        stack = Stack(fs, "revnet", backprop="reverse(every=0)")
        if not whole:
            for f in fs:
                f.compile(backend="aot_eager")
        net = torch.compile(stack, backend="aot_eager") if whole else stack
        x = batch(512, dtype=torch.float32)
        stack(x)
        peaks.append(peak(net, x))  # type: ignore[arg-type]
    parameters = sum(p.numel() for p in stack.steps[0].parameters()) * 4
    assert (peaks[1] - peaks[0]) / 6 <= parameters + 500, peaks


@pytest.mark.cases(2)
@pytest.mark.parametrize("mode", ["checkpoint", "reverse", "exact", "2*store + 2*reverse", "auto(memory=1GB)"])
def test_without_gradients_the_whole_stack_is_one_graph_in_every_mode(mode: str) -> None:
    torch.manual_seed(0)
    stack = Stack([Smooth() for _ in range(8)], "revnet", backprop=mode).eval()
    x = batch(dtype=torch.float32)
    with torch.no_grad():
        want = stack(x)
        torch.testing.assert_close(torch.compile(stack, backend="eager", fullgraph=True)(x), want)
