"""Blocks of an existing model as a stack, against the model as it was: values, gradients, keys, memory, refusals."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import odenets
from odenets import Restacked, RestackWarning, restack, unrestack
from odenets.backprop.meter import meter_on
from odenets.stack import Stack, keeping_all, named_stacks
from schemes import SchemeError

D = torch.float64
FAITHFUL = [("euler", "store"), ("euler", "checkpoint"), ("bdia", "store"), ("bdia", "exact"), ("bdia", "reverse")]


class Block(nn.Module):
    """A block with a skip of its own, a mask, dropout, and a form of output."""

    def __init__(self, width=8, form="tensor", drop=0.0):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), nn.Linear(width, width)
        self.dropout, self.form = nn.Dropout(drop), form

    def forward(self, hidden, mask=None, *, scale=1.0, log=None):
        y = hidden + 0.3 * scale * self.dropout(torch.tanh(self.inner(self.norm(hidden))))
        if mask is not None:
            y = torch.where(mask, y, hidden)
        if log is not None:
            log.append(y)
        return {"tensor": y, "tuple": (y,), "padded": (y, None), "attentions": (y, y.mean())}[self.form]


class Net(nn.Module):
    """A model in the manner of transformers: a loop over a list of blocks."""

    def __init__(self, depth=6, form="tensor", loop="plain", drop=0.0):
        super().__init__()
        self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 2)
        self.layers = nn.ModuleList(Block(form=form, drop=drop) for _ in range(depth))
        self.loop = loop

    def forward(self, x, **kwargs):
        h, states = self.embed(x), []
        layers = self.layers
        if self.loop == "full slice":
            layers = layers[: len(layers)]
        elif self.loop == "some":
            layers = layers[:4]
        elif self.loop == "numbers":
            layers = [layers[i] for i in range(len(layers))]
        for i, layer in enumerate(layers):
            if self.loop == "dropped" and i == 2:
                continue
            if self.loop == "stopped" and i == 4:
                break
            if self.loop == "between":
                h = h + 1
            if self.loop == "scales":
                kwargs = {"scale": 1.0 + i}
            if self.loop == "parallel":
                y = layer(h, **kwargs)
                h = y if i == len(layers) - 1 else h
                continue
            if self.loop == "by name":
                h = layer(hidden=h, **kwargs)
            else:
                h = layer(h, **kwargs)
            if isinstance(layer, Block) and layer.form != "tensor":
                h = h[0]
            if self.loop == "states":
                states.append(h)
        return sum(s.mean() for s in states) + self.head(h) if states else self.head(h)


def build(depth=6, seed=0, **options):
    torch.manual_seed(seed)
    return Net(depth, **options).to(D)


def batch(n=4):
    return torch.randn(n, 3, dtype=D, generator=torch.Generator().manual_seed(1))


def step(model, x, **kwargs):
    """The output, and all gradients of a training step as one vector."""
    model.zero_grad()
    y = model(x, **kwargs)
    y.square().sum().backward()
    return y.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.cases(8)
@pytest.mark.parametrize(("scheme", "backprop"), FAITHFUL)
@pytest.mark.parametrize("form", ["tensor", "tuple", "padded"])
def test_outputs_in_evaluation_are_those_of_the_model(scheme, backprop, form):
    x, want = batch(), build(form=form).eval()
    net = restack(build(form=form), "layers", scheme, backprop).eval()
    with torch.no_grad():
        torch.testing.assert_close(net(x), want(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backprop", ["store", "checkpoint", "checkpoint(4)", "offload"])
@pytest.mark.parametrize("loop", ["plain", "full slice", "by name", "scales"])
def test_gradients_under_euler_are_those_of_the_model(backprop, loop):
    x, mask = batch(), torch.rand(4, 8, generator=torch.Generator().manual_seed(2)) < 0.7
    given = {} if loop == "scales" else {"mask": mask}
    y, g = step(build(loop=loop), x, **given)
    z, h = step(restack(build(loop=loop), "layers", "euler", backprop), x, **given)
    torch.testing.assert_close(z, y, rtol=0, atol=1e-12)
    assert (h - g).norm() <= 1e-12 * g.norm()


@pytest.mark.parametrize(
    ("scheme", "backprop"), [("bdia", "exact"), ("bdia", "reverse"), ("momentum(9/10)", "reverse")]
)
@pytest.mark.parametrize("loop", ["plain", "scales"])
def test_gradients_of_the_modes_that_reverse_are_those_of_the_stored_run(scheme, backprop, loop):
    given = {} if loop == "scales" else {"mask": torch.rand(4, 8) < 0.7}
    found = []
    for mode in ("exact(store=true)" if backprop == "exact" else "store", backprop):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RestackWarning)
            net = restack(build(loop=loop), "layers", scheme, mode)
        torch.manual_seed(3)
        found.append(step(net, batch(), **given))
    (y, g), (z, h) = found
    torch.testing.assert_close(z, y, rtol=0, atol=1e-9)
    assert (h - g).norm() <= 1e-8 * g.norm()


def test_the_gradient_of_a_mask_arrives():
    class Gate(Block):
        def forward(self, hidden, gate):
            return hidden + gate * torch.tanh(self.inner(hidden))

    class Gated(Net):
        def forward(self, x, gate):
            h = self.embed(x)
            for layer in self.layers:
                h = layer(h, gate)
            return self.head(h)

    def gradient(**options):
        torch.manual_seed(0)
        net, gate = Gated(4), torch.ones(8, dtype=D, requires_grad=True)
        net.layers = nn.ModuleList(Gate() for _ in range(4))
        net = net.to(D)
        if options:
            restack(net, "layers", **options)
        torch.manual_seed(5)
        net(batch(), gate * 2).sum().backward()
        return gate.grad

    want = gradient(scheme="bdia", backprop="store")
    torch.testing.assert_close(gradient(scheme="bdia", backprop="reverse"), want, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(gradient(scheme="euler", backprop="checkpoint"), gradient(), rtol=1e-9, atol=1e-12)


def test_the_model_stays_what_it_was_but_for_its_blocks_loop():
    net, plain = build(), build()
    keys, kind = list(net.state_dict()), type(net.layers)
    names = [name for name, _ in net.named_modules()]
    assert restack(net, "layers", "bdia", "exact") is net
    assert list(net.state_dict()) == keys and [name for name, _ in net.named_modules()] == names
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert isinstance(net.layers, kind) and isinstance(net.layers, Restacked) and len(net.layers) == 6
    assert isinstance(net.layers[2], Block) and isinstance(net.layers.stack, Stack)
    assert all(isinstance(layer, Block) for layer in net.layers)
    assert [layer is net.layers[i] or layer == net.layers[i] for i, layer in enumerate(net.layers)] == [True] * 6
    assert "RestackedModuleList" in repr(net)
    net.load_state_dict(plain.state_dict())
    assert unrestack(net) is net and type(net.layers) is kind
    assert not net._forward_hooks and not net._forward_pre_hooks and "_restacking" not in vars(net.layers)
    assert all(layer is net.layers[i] for i, layer in enumerate(net.layers))
    torch.testing.assert_close(net(batch()), plain(batch()), rtol=0, atol=0)


def test_what_is_done_to_the_blocks_in_a_loop_reaches_them():
    net = restack(build(), "layers", "bdia", "exact")
    for layer in net.layers:
        layer.inner.requires_grad_(False)
        layer.tag = "seen"
    for layer in net.layers[:2]:
        layer.eval()
    assert not any(p.requires_grad for n, p in net.named_parameters() if ".inner." in n)
    assert all(net.layers[i].tag == "seen" for i in range(6))
    assert [net.layers[i].training for i in range(3)] == [False, False, True]
    net(batch()).sum().backward()
    assert [net.layers[i].training for i in range(3)] == [False, False, True]
    for layer in net.layers:
        del layer.tag
    assert not hasattr(net.layers[0], "tag")


@pytest.mark.parametrize("backprop", ["store", "exact"])
def test_a_block_that_is_replaced_is_not_stale(backprop):
    net = restack(build().eval(), "layers", "bdia", backprop)
    net(batch())
    other = Block().to(D).eval()
    net.layers[3] = other
    want = build().eval()
    want.layers[3] = copy.deepcopy(other)
    torch.testing.assert_close(net(batch()), want(batch()), rtol=0, atol=1e-12)
    net.layers[1].inner = nn.Linear(8, 8).to(D)  # as adapters do
    want.layers[1].inner = copy.deepcopy(net.layers[1].inner)
    torch.testing.assert_close(net(batch()), want(batch()), rtol=0, atol=1e-12)
    net.train()
    net(batch()).sum().backward()
    assert net.layers[1].inner.weight.grad.any() and other.inner.weight.grad.any()
    del net.layers[0]
    del want.layers[0]
    torch.testing.assert_close(net.eval()(batch()), want(batch()), rtol=0, atol=1e-12)
    assert net.layers.stack.depth == 5


def test_training_reaches_the_stack():
    net = restack(build(), "layers", "bdia", "store")
    x, plain = batch(), build()(batch())
    assert not torch.equal(net(x), net(x))  # bdia draws
    torch.testing.assert_close(net.eval()(x), plain, rtol=0, atol=1e-12)
    assert not torch.equal(net.train()(x), plain)
    with torch.no_grad():
        assert not torch.equal(net(x), plain)


def test_copies_and_pickles():
    net = restack(build().eval(), "layers", "bdia", "exact")
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(other(batch()), net(batch()), rtol=0, atol=0)
        with torch.no_grad():
            other.layers[0].inner.weight.zero_()
        assert other.layers.stack.steps[0].fs[0].block is other.layers[0] is not net.layers[0]
        assert not torch.equal(other(batch()), net(batch()))
        assert type(unrestack(other).layers) is nn.ModuleList
        other(batch())
    assert isinstance(net.layers, Restacked)


def test_dropout_is_drawn_as_the_model_draws_it():
    found = []
    for backprop in (None, "store", "checkpoint"):
        net = build(drop=0.5)
        if backprop:
            restack(net, "layers", "euler", backprop)
        torch.manual_seed(7)
        found.append(step(net, batch()))
    for y, g in found[1:]:
        torch.testing.assert_close(y, found[0][0], rtol=0, atol=1e-12)
        torch.testing.assert_close(g, found[0][1], rtol=0, atol=1e-12)


def test_another_scheme_is_another_network_and_says_so():
    with pytest.warns(RestackWarning, match="under midpoint the blocks of 'layers' make another network"):
        net = restack(build(), "layers", "midpoint")
    functions = [lambda h, b=b: b(h) - h for b in (net.layers[i] for i in range(6))]
    h = net.embed(batch())
    for f, g in zip(functions[::2], functions[1::2], strict=True):
        h = h + g(h + f(h) / 2)
    torch.testing.assert_close(net(batch()), net.head(h), rtol=0, atol=1e-12)
    with pytest.warns(RestackWarning, match="under euler with step=0.5"):
        restack(net, "layers", step=0.5)


def test_restacking_again_takes_the_place_of_the_first():
    net = restack(build(), "layers", "bdia", "exact")
    restack(net, "layers", "euler", "checkpoint")
    assert str(net.layers.stack.scheme) == "euler" and len(net._forward_hooks) == 1
    with pytest.raises(SchemeError, match="uses 4 at a time"):
        restack(net, "layers", "rk4")
    assert str(net.layers.stack.scheme) == "euler"
    restack(net, "layers", "euler").layers.stack.backprop = "checkpoint(2)"
    assert str(net.layers.stack.backprop) == "checkpoint(2)"


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        ("between", "computes between the blocks of 'layers'|reads the hidden state between"),
        ("parallel", "computes between the blocks of 'layers'"),
        ("dropped", "block 3 of 'layers' is called where block 2 is due"),
        ("stopped", "reads the hidden state between two blocks"),
        ("numbers", "Net has not run the blocks of 'layers' by iterating"),
        ("some", "Net has not run the blocks of 'layers' by iterating"),
        ("states", "reads the hidden state between two blocks"),
    ],
)
def test_a_model_that_a_stack_cannot_stand_for_is_refused(loop, message):
    net = restack(build(loop=loop), "layers", "bdia", "exact")
    with pytest.raises(SchemeError, match=message):
        net(batch())
    unrestack(net)(batch())


def test_some_of_the_blocks_run_alone_only_where_there_are_states_between():
    faithful = restack(build(), "layers", "bdia", "exact")
    assert [b is faithful.layers[i] for i, b in enumerate(faithful.layers[:3])] == [True] * 3
    with pytest.warns(RestackWarning):
        other = restack(build(), "layers", "midpoint")
    part = other.layers[:3]
    part[0].inner.requires_grad_(False)
    assert not other.layers[0].inner.weight.requires_grad
    with pytest.raises(SchemeError, match="some of the blocks of 'layers' are to be run without the others"):
        part[0](torch.zeros(1, 8, dtype=D))


def test_blocks_that_return_more_than_a_state_are_refused():
    net = restack(build(form="attentions"), "layers")
    with pytest.raises(SchemeError, match=r"Block returns more than its hidden state \(item 1\)"):
        net(batch())


@pytest.mark.parametrize(("scheme", "backprop"), [("euler", "checkpoint"), ("bdia", "exact"), ("bdia", "store")])
def test_an_argument_that_blocks_write_to_is_refused_where_they_run_again(scheme, backprop):
    net, log = restack(build(), "layers", scheme, backprop), []
    if backprop == "store":
        net(batch(), log=log).sum().backward()
        assert len(log) == 6
        return
    with pytest.raises(SchemeError, match="writes to an argument that the model hands it"):
        net(batch(), log=log)
    with torch.no_grad():
        net.eval()(batch(), log=log)


class Cache:
    """A cache of past states, as far as restack looks at one."""

    def __init__(self):
        self.states = {}

    def get_seq_length(self):
        return max((s.shape[1] for s in self.states.values()), default=0)


class Attends(nn.Module):
    def __init__(self, place):
        super().__init__()
        self.inner, self.place = nn.Linear(8, 8), place

    def forward(self, h, cache=None):
        past = h
        if cache is not None:
            past = torch.cat([cache.states[self.place], h], 1) if self.place in cache.states else h
            cache.states[self.place] = past
        n, m = h.shape[1], past.shape[1]
        seen = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        return h + torch.tanh(self.inner((h @ past.mT).masked_fill(~seen, -1e9).softmax(-1) @ past))


class Causal(nn.Module):
    def __init__(self, depth=4):
        super().__init__()
        self.h = nn.ModuleList(Attends(i) for i in range(depth))

    def forward(self, x, cache=None):
        for block in self.h:
            x = block(x, cache)
        return x


def causal(scheme, backprop="store"):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RestackWarning)
        return restack(Causal(), "h", scheme, backprop).double()


@pytest.mark.parametrize("scheme", ["euler", "bdia", "midpoint", "leapfrog", "rk4"])
def test_a_cache_gives_what_all_at_once_gives(scheme):
    net, x = causal(scheme).eval(), torch.randn(2, 5, 8, dtype=D)
    with torch.no_grad():
        want, cache = net(x), Cache()
        got = torch.cat([net(x[:, :2], cache), net(x[:, 2:3], cache), net(x[:, 3:], cache)], 1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("scheme", "backprop"), [("euler", "checkpoint"), ("bdia", "exact"), ("bdia", "reverse")])
def test_a_cache_is_dropped_where_blocks_run_again_and_cannot_be_used_after(scheme, backprop):
    net, x, cache = causal(scheme, backprop), torch.randn(2, 5, 8, dtype=D), Cache()
    torch.manual_seed(1)
    with pytest.warns(RestackWarning, match=r"runs blocks again, so the cache of 'h' is dropped"):
        y = net(x, cache)
    y.square().sum().backward()
    got = torch.cat([p.grad.flatten() for p in net.parameters()])
    net.zero_grad()
    torch.manual_seed(1)
    net(x).square().sum().backward()
    want = torch.cat([p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert not cache.states
    for other in (cache, copy.deepcopy(cache)):
        with pytest.raises(SchemeError, match="was kept from its blocks by an earlier pass"), torch.no_grad():
            net.eval()(x[:, -1:], other)


def test_a_cache_is_refused_where_it_is_full_or_would_be_extended_twice():
    x, cache = torch.randn(2, 3, 8, dtype=D), Cache()
    net = causal("bdia", "exact").eval()
    with torch.no_grad():
        net(x, cache)
    with pytest.raises(SchemeError, match=r"backprop='exact' runs blocks again[^.]*extended wrongly"):
        net(x, cache)
    with torch.no_grad(), pytest.raises(SchemeError, match="bdia draws in training"):
        net.train()(x, Cache())
    with torch.no_grad(), pytest.raises(SchemeError, match="evaluates a block more than once a pass"):
        causal("reversible(euler)")(x, Cache())


class Level(nn.Sequential):
    """A level of a ResNet: its first block changes the shape."""

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride=1):
            super().__init__()
            self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1)
            self.norm = nn.BatchNorm2d(outputs)
            self.downsample = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs or stride > 1 else None

        def forward(self, x):
            y = x if self.downsample is None else self.downsample(x)
            return torch.relu(y + self.norm(self.conv(x)))

    def __init__(self, inputs, outputs, depth, stride=1):
        super().__init__(self.Block(inputs, outputs, stride), *(self.Block(outputs, outputs) for _ in range(depth - 1)))


def levels():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), Level(4, 4, 3), Level(4, 8, 3, 2), Level(8, 8, 4, 2)).to(D)


def test_a_first_block_that_changes_the_shape_stays_outside():
    x, plain = torch.randn(2, 3, 12, 12, dtype=D), levels()
    net = restack(levels(), ["1", "2", "3"], "euler", "checkpoint")
    y, g = step(net, x)
    z, h = step(plain, x)
    torch.testing.assert_close(y, z, rtol=0, atol=1e-12)
    assert (g - h).norm() <= 1e-11 * h.norm()
    assert [net[i].stack.depth for i in (1, 2, 3)] == [3, 2, 3]
    for key, value in plain.state_dict().items():  # statistics have moved once, and the trial has moved none
        torch.testing.assert_close(net.state_dict()[key], value, rtol=0, atol=1e-12, msg=key)


def test_a_first_block_that_is_only_made_otherwise_stays_inside():
    net = build()
    net.layers[0].inner = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)).to(D)
    plain = copy.deepcopy(net)
    restack(net, "layers", "euler")
    torch.testing.assert_close(net(batch()), plain(batch()), rtol=0, atol=1e-12)
    assert net.layers.stack.depth == 6
    restack(net, "layers", outside=2)
    torch.testing.assert_close(net(batch()), plain(batch()), rtol=0, atol=1e-12)
    assert net.layers.stack.depth == 4


def test_a_pattern_restacks_several_containers():
    net = nn.Sequential(*(nn.ModuleDict({"blocks": Level(4, 4, 2)}) for _ in range(2)))
    restack(net, "*.blocks")
    assert [name for name, _ in named_stacks(net)] == ["0.blocks", "1.blocks"]
    unrestack(net, "1.blocks")
    assert [name for name, _ in named_stacks(net)] == ["0.blocks"]


def test_a_model_that_is_a_sequence_itself():
    net = restack(Level(4, 4, 3), "").eval()
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(net(x), unrestack(copy.deepcopy(net))(x))


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("layer", {}, r"'layer' is no module of Net.\n  There are: 'layers' \(6 Block\)"),
        ("head", {}, "'head' is a Linear, want a ModuleList or Sequential"),
        ("layers", {"scheme": "rk4"}, r"restack, 'layers': .*6 residual functions for rk4, .* 4 or 8"),
        ("layers", {"scheme": "midpoint", "backprop": "reverse"}, "midpoint has no inverse"),
        ("layers", {"step": "learned"}, "would add parameters"),
        ("layers", {"seed": 1}, "euler draws nothing in training"),
        ("layers", {"outside": 6}, "holds 6 blocks, 6 of them outside"),
        (["layers", "nothing"], {}, "'nothing' is no module"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(path, options, message):
    net = build()
    with pytest.raises(SchemeError, match=message):
        restack(net, path, **options)
    assert type(net.layers) is nn.ModuleList and not net._forward_hooks


# Not bdia in reverse: its inverse doubles errors, so that a state is kept every so many steps.
@pytest.mark.parametrize(("scheme", "backprop"), [("bdia", "exact"), ("momentum(9/10)", "reverse")])
def test_what_is_kept_does_not_grow_with_the_depth(scheme, backprop):
    def kept(depth, **options):
        net, x = build(depth), torch.randn(8, 64, 3, dtype=D)
        if options:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RestackWarning)
                restack(net, "layers", **options)
        net(x).sum().backward()
        with meter_on(x.device) as meter:
            meter.mark()
            y = net(x).sum()
            meter.mark()
        del y
        return meter.intervals[1].start

    state = 512 * 8 * 8
    per_block = (kept(24, scheme=scheme, backprop=backprop) - kept(8, scheme=scheme, backprop=backprop)) / 16
    plain = (kept(24) - kept(8)) / 16
    # bdia's exact arithmetic keeps a bit an element, of 64, and bdia a sign a sample.
    assert plain > 3 * state and per_block < 0.05 * state, (plain / state, per_block / state)


def test_torch_fx_traces_blocks_that_store():
    class Looped(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(Level.Block(4, 4) for _ in range(6))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    net, x = restack(Looped().eval(), "layers", "bdia"), torch.randn(2, 4, 5, 5)
    traced = torch.fx.symbolic_trace(net)
    torch.testing.assert_close(traced(x), net(x), rtol=0, atol=0)
    assert {f"layers.{i}.conv" for i in range(6)} <= {str(node.target) for node in traced.graph.nodes}
    with pytest.raises(SchemeError, match=r"draws in training.*model.eval"):
        torch.fx.symbolic_trace(net.train())
    with pytest.raises(SchemeError, match="Trace with backprop='store'"):
        torch.fx.symbolic_trace(restack(Looped().eval(), "layers", "bdia", "exact"))
    with pytest.raises(SchemeError, match=r"comes before a trace.\n.*outside=1"):
        torch.fx.symbolic_trace(restack(levels().eval(), "2"))
    torch.fx.symbolic_trace(restack(levels().eval(), "2", outside=1))


@pytest.mark.cases(2)
@pytest.mark.parametrize(("scheme", "backprop"), FAITHFUL)
def test_torch_export_runs_in_every_mode(scheme, backprop):
    net, x = restack(build(3).eval(), "layers", scheme, backprop), batch()
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    torch.testing.assert_close(program.module()(batch(7)), net(batch(7)), rtol=0, atol=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("loaded", [[], ["transformers.utils.output_capturing"]], ids=["alone", "with transformers"])
def test_a_compiler_follows_blocks_that_store(loaded):
    for module in loaded:
        pytest.importorskip(module)
    net, x = restack(build(2).eval(), "layers", "bdia"), batch()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x), rtol=0, atol=1e-12)


def test_plans_and_modes_reach_a_restacked_model():
    net = restack(build(), "layers", "bdia", "auto(memory=1GB)")
    assert [name for name, _ in named_stacks(net)] == ["layers"]
    report = odenets.plan(net, batch(), memory="1MB")
    assert list(report.plans) == ["layers"]
    with keeping_all(net):
        assert str(net.layers.stack.backprop) == "store"
    assert str(net.layers.stack.backprop).startswith("auto")


# The seed of what a scheme draws


def drawing(**options):
    torch.manual_seed(0)
    return Stack([nn.Linear(3, 3) for _ in range(6)], "bdia", **options).to(D)


@pytest.mark.parametrize(
    "backprop", ["store", "checkpoint", "checkpoint(4)", "reverse", "exact", "3*store + 3*reverse"]
)
def test_a_seed_draws_apart_from_torchs_generator(backprop):
    x = batch()
    found = []
    for other in (1, 2):
        stack = drawing(seed=5, backprop=backprop)
        torch.manual_seed(other)
        before = torch.get_rng_state()
        passes = [step(stack, x) for _ in range(2)]
        assert torch.equal(torch.get_rng_state(), before)
        found.append(passes)
    for (y, g), (z, h) in zip(*found, strict=True):
        assert torch.equal(y, z) and torch.equal(g, h)
    assert not torch.equal(found[0][0][0], found[0][1][0])  # the second pass draws anew
    want = drawing(seed=5, backprop="exact(store=true)" if backprop == "exact" else "store")
    for y, g in found[0]:
        z, h = step(want, x)
        torch.testing.assert_close(y, z, rtol=0, atol=1e-9)
        assert (g - h).norm() <= 1e-8 * h.norm()


def test_a_seeded_run_goes_on_where_it_was():
    x, stack = batch(), drawing(seed=5)
    stack(x)
    state = stack.plan_state()
    want = stack(x)
    other = drawing(seed=9)
    other.load_plan_state(state)
    assert torch.equal(other(x), want)
    copied = copy.deepcopy(stack)
    assert torch.equal(copied(x), stack(x)) and torch.equal(pickle.loads(pickle.dumps(stack))(x), stack(x))
    assert list(stack.state_dict()) == list(drawing().state_dict())
    with pytest.raises(SchemeError, match="draws nothing in training; bdia does"):
        Stack([nn.Linear(3, 3)], "euler", seed=1)


def test_a_seed_reaches_schemes_within_schemes():
    x = batch()
    for scheme in ("nested(bdia, euler)", "repeat(bdia, 2)", "substeps(bdia, 2)"):
        fs = [nn.Linear(3, 3).to(D) for _ in range(8)]
        got = []
        for other in (1, 2):
            stack = Stack(fs, scheme, seed=3) if "substeps" not in scheme else Stack(fs[:4], scheme, seed=3)
            torch.manual_seed(other)
            got.append(stack(x))
        assert torch.equal(*got), scheme


@pytest.mark.parametrize("outside", [-1, True, 1.0, "1"])
def test_a_number_of_blocks_outside_is_a_whole_number(outside):
    net = Net()
    with pytest.raises(SchemeError, match=r"outside is .*\n.*whole number from 0, or None"):
        restack(net, "layers", outside=outside)
    assert type(net.layers) is nn.ModuleList


@pytest.mark.parametrize("change", [lambda layers: layers.append(Block()), lambda layers: layers.pop(-1)])
def test_what_was_set_on_the_stack_outlives_a_change_of_its_blocks(change):
    net = Net()
    restack(net, "layers", "bdia", "store")
    assert str(net.layers.stack.backprop) == "store"
    net.layers.stack.backprop = "exact"
    net.layers.stack.set_step(0.25)
    stack = net.layers.stack
    change(net.layers)
    assert net.layers.stack is not stack and net.layers.stack.depth == len(net.layers)
    assert str(net.layers.stack.backprop) == "exact" and {step.h for step in net.layers.stack.steps} == {0.25}
    # What was not set stays as it was asked for.
    other = restack(Net(), "layers", "bdia", "checkpoint")
    change(other.layers)
    assert str(other.layers.stack.backprop) == "checkpoint" and {s.h for s in other.layers.stack.steps} == {1.0}
