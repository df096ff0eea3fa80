"""Couplings whose streams are slices of the input, and RevCol's: formulas, laws, slots, refusals."""

import pytest
import torch
from hypothesis import given

import schemes
from odenets import Stack
from schemes.coupling import Update, apply_update, invert_update
from schemes.testing.reversible import check_inverse, couplings, run, smooth_functions, states

INVERTIBLE = [text for text in schemes.examples() if schemes.get(text).invertible]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


class Scale(torch.nn.Module):
    """A shortcut with an inverse."""

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = alpha

    def forward(self, x):
        return self.alpha * x

    def inverse(self, y):
        return y / self.alpha


class SpaceToDepth(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.pixel_unshuffle(x, 2)

    def inverse(self, y):
        return torch.nn.functional.pixel_shuffle(y, 2)


@given(couplings(), states())
def test_round_trip_law(scheme, x):
    check_inverse(scheme, x)


@pytest.mark.parametrize("name", INVERTIBLE)
def test_step_size_may_be_a_tensor(name):
    scheme = schemes.get(name)
    fs = smooth_functions(scheme, 8, 3)
    x, h = normal(2, 8), torch.tensor(0.7, dtype=torch.float64)
    for a, b in zip(run(scheme, fs, x, 0.7)[-1], run(scheme, fs, x, h)[-1], strict=True):  # type: ignore[arg-type]
        assert torch.allclose(a, b, atol=1e-12)


class Joined(torch.nn.Linear):
    """A linear layer of all arguments."""

    def __init__(self, slot):
        super().__init__(sum(slot.in_channels), slot.out_channels)

    def forward(self, *xs):
        return super().forward(torch.cat(xs, 1))


@pytest.mark.cases(40)
@pytest.mark.parametrize("name", [text for text in schemes.examples() if schemes.get(text).nodes is not None])
@pytest.mark.filterwarnings("ignore::schemes.MixingWarning", "ignore:.*enter the error estimate only")
def test_a_stack_is_made_from_the_slots(name):
    """In evaluation and in training, where its steps may be others; the output is the readout of the last widths."""
    scheme = schemes.get(name)
    depth = 3 * len(scheme.plan)
    stack = Stack.from_factory(Joined, name, depth, channels=8)
    widths = scheme.stream_widths(8)
    for n in range(depth):
        widths = scheme.at(n).widths(n, widths)
    out = scheme.readout(tuple(torch.zeros(2, w) for w in widths)).shape
    assert stack.eval()(torch.randn(2, 8)).shape == stack.train()(torch.randn(2, 8)).shape == out


def test_revnet_is_its_formula():
    f, g = torch.sin, torch.cos
    x = normal(2, 5)
    a, b = x[:, :3], x[:, 3:]
    revnet = schemes.get("revnet")
    pad, cut = lambda t: torch.nn.functional.pad(t, (0, 1)), lambda t: t[:, :2]
    y = revnet.readout(revnet.step([lambda s: pad(f(s)), lambda s: cut(g(s))], revnet.init((), x), h=0.5))
    a = a + 0.5 * pad(f(b))
    b = b + 0.5 * cut(g(a))
    assert torch.equal(y, torch.cat([a, b], 1))


def test_streams_may_be_split_along_any_dimension():
    x = normal(2, 3, 8)
    tokens, channels = schemes.get("revnet(dim=-1)"), schemes.get("revnet")
    fs = (torch.sin, torch.cos)
    y = tokens.readout(tokens.step(fs, tokens.init(fs, x)))
    flipped = x.transpose(1, 2)
    assert torch.equal(y, channels.readout(channels.step(fs, channels.init(fs, flipped))).transpose(1, 2))


def test_two_streams_three_ways():
    """additive(2) is revnet, and so are two steps of multilevel(2, 1)."""
    x, fs = normal(2, 6), (torch.sin, torch.cos)
    revnet, additive, levels = (schemes.get(s) for s in ("revnet", "additive(2)", "multilevel(2, 1)"))
    y = revnet.readout(revnet.step(fs, revnet.init(fs, x)))
    assert torch.equal(additive.readout(additive.step(fs, additive.init(fs, x))), y)
    state = levels.step(fs[1:], levels.step(fs[:1], levels.init(fs, x)))
    assert torch.equal(levels.readout(state), y)


def test_additive_joins_the_other_streams_in_order():
    x, given_ = normal(1, 3), []

    def f(s):
        given_.append(s)
        return torch.ones(1, 1, dtype=torch.float64)

    scheme = schemes.get("additive(3)")
    scheme.step([f, f, f], scheme.init((), x))
    a, b, c = x.split(1, 1)
    want = [torch.cat(p, 1) for p in ([b, c], [a + 1, c], [a + 1, b + 1])]
    assert all(torch.equal(got, w) for got, w in zip(given_, want, strict=True))


def test_affine_scale_is_bounded():
    scheme = schemes.get("affine(bound=0.5)")
    x = torch.ones(1, 2, dtype=torch.float64)

    def huge(s):
        return torch.tensor([[1e9, 3.0]], dtype=torch.float64)

    a, b = scheme.step([huge, huge], scheme.init((), x))
    assert torch.allclose(a, torch.tensor(0.5).double().exp() + 3) and torch.equal(a, b)
    assert scheme.amplification == pytest.approx(float(torch.tensor(0.5).double().exp()))


def test_multilevel_is_its_recursion():
    scheme = schemes.get("multilevel(3, 0.5)")
    x = normal(2, 3)
    history = list(x.split(1, 1))
    fs = [lambda newest, older: torch.sin(newest + 2 * older)] * 5
    state = scheme.init(fs, x)
    for f in fs:
        state = scheme.step([f], state)
        history.append(torch.sin(history[-1] + 2 * history[-2]) + 0.5 * history[-3])
    assert all(torch.allclose(a, b, atol=1e-14) for a, b in zip(state, history[-3:], strict=True))


@pytest.mark.parametrize("huge", [False, True])
def test_revcol_is_its_formula_on_levels_of_different_shapes(huge):
    torch.manual_seed(1)
    alphas = [Scale(a) for a in (0.5, -0.8, 1.2, 0.5)]
    widths = (2, 2, 4, 8, 16)

    def make(level):
        down = torch.randn(widths[level + 1], widths[level], dtype=torch.float64) / 2
        up = torch.randn(widths[level + 1], widths[min(level + 2, 4)], dtype=torch.float64) / 4
        top = torch.randn(widths[level + 1], widths[4], dtype=torch.float64) / 8
        resize = torch.nn.functional.interpolate

        def f(lower, upper=None, last=None):
            size = 32 // 2 ** max(level, 0)
            y = down @ resize(lower, size=size)
            y = y if upper is None else y + up @ resize(upper, size=size)
            return torch.tanh(y if last is None else y + top @ resize(last, size=size))

        return f

    columns = [[make(level) for level in range(4)] for _ in range(4)]
    scheme = schemes.get(f"revcol(4, huge={huge})")
    x = normal(1, 2, 32)
    found = run(scheme, columns, x, gs=alphas)
    levels: list = [None] * 4
    for n, fs in enumerate(columns):
        old, below = list(levels), x
        for level in range(4):
            upper = old[level + 1] if n and level < 3 else None
            last = old[3] if n and huge and level == 0 else None
            k = fs[level](below, upper, last)
            levels[level] = below = k + alphas[level].alpha * old[level] if n else k
        assert all(torch.allclose(a, b, atol=1e-13) for a, b in zip(found[n + 1], [x, *levels], strict=True))
    assert torch.equal(scheme.readout(found[-1]), found[-1][4])
    state = found[-1]
    for n in (3, 2, 1, 0):
        state = scheme.at(n).inverse(columns[n], state, gs=alphas if n else ())
        assert len(state) == len(found[n])
        assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(state, found[n], strict=True))


def test_revcol_slots_of_the_first_and_the_later_columns():
    scheme = schemes.get("revcol")
    widths = scheme.at(0).widths(0, (8,))
    assert widths == (8, 8, 16, 32, 64)
    assert [(s.in_channels, s.out_channels) for s in scheme.at(0).slots(0, (8,))] == [
        ((8,), 8),
        ((8,), 16),
        ((16,), 32),
        ((32,), 64),
    ]
    later = scheme.at(1).slots(1, widths)
    assert [s.in_channels for s in later] == [(8, 16), (8, 32), (16, 64), (32,)]
    assert scheme.at(2) is scheme.at(1) is scheme
    assert schemes.get("revcol(huge=true)").slots(1, widths)[0].in_channels == (8, 16, 64)


def test_invertible_downsampling_in_the_first_step():
    """Two shortcuts, space to depth: the first function makes the new shape from the old one."""
    scheme, x = schemes.get("revnet"), normal(1, 4, 4, 4)
    slots = scheme.slots(0, (2, 2), 16)
    assert [(s.in_channels, s.out_channels, s.raw) for s in slots] == [((2,), 8, True), ((8,), 8, False)]
    fs = [lambda s: torch.nn.functional.pixel_unshuffle(s.sin(), 2), torch.cos]
    gs = (SpaceToDepth(), SpaceToDepth())
    state = scheme.step(fs, scheme.init(fs, x), gs=gs)
    assert scheme.readout(state).shape == (1, 16, 2, 2)
    assert torch.allclose(scheme.readout(scheme.inverse(fs, state, gs=gs)), x, atol=1e-14)


@pytest.mark.parametrize("name", ["momentum(0.3)", "lm_resnet(0.3)", "multilevel(3, 0.3)", "leapfrog"])
def test_a_shortcut_takes_the_place_of_the_fixed_factor(name):
    scheme = schemes.get(name)
    same = {"leapfrog": 1.0, "lm_resnet(0.3)": -0.3}.get(name, 0.3)
    x = normal(2, 6)
    fs = smooth_functions(scheme, 6, 4)
    plain, learned = run(scheme, fs, x)[-1], run(scheme, fs, x, gs=(Scale(same),))[-1]
    assert all(torch.allclose(a, b, atol=1e-14) for a, b in zip(plain, learned, strict=True))
    other = run(scheme, fs, x, gs=(Scale(0.9),))[-1]
    assert not all(torch.allclose(a, b) for a, b in zip(plain, other, strict=True))
    check_inverse(scheme, x, gs=(Scale(0.9),))


def test_an_update_that_makes_and_one_that_emits():
    made = Update(1, lambda s: (1.0, 2 * s[0]), appends=True)
    x = normal(3)
    assert torch.equal(apply_update(made, (x,))[1], 2 * x)
    assert len(invert_update(made, apply_update(made, (x,)))) == 1
    emits = Update(0, lambda s: (-1.0, s[1].sin(), s[1].cos()), byproduct=2)
    state = (x, 2 * x, torch.zeros(3))
    after = apply_update(emits, state)
    assert torch.equal(after[2], (2 * x).cos())
    back = invert_update(emits, after)
    assert torch.allclose(back[0], x) and back[2] is after[2]


@pytest.mark.parametrize(
    "text, message",
    [
        ("additive(1)", "1 streams, want a whole number of at least 2"),
        ("multilevel(1)", "1 streams"),
        ("multilevel(2, 0)", "oldest stream is lost"),
        ("affine(bound=0)", "bound of the log-scale is 0"),
        ("revcol(0)", "levels is 0"),
        ("revcol(2, huge=true)", "levels is 2, want a whole number of at least 3"),
        ("momentum(0)", "beta is 0"),
        ("momentum(1)", "beta is 1"),
        ("lm_resnet(0)", "k is 0"),
        ("alf(1/2)", "v would be lost"),
        ("alf(2)", "eta is 2"),
        ("dense(0)", "growth is 0"),
        ("bdia(1/3)", "gamma is 0.333"),
        ("reversible(revnet)", "one stream"),
        ("reversible(rk4, coupling=1)", "want 0 < coupling < 1"),
    ],
)
def test_what_cannot_work_is_refused(text, message):
    with pytest.raises(schemes.SchemeError, match=message):
        schemes.get(text)


@pytest.mark.parametrize("name", [text for text in schemes.examples() if schemes.get(text).at(0).shortcuts == 0])
def test_shortcuts_that_a_scheme_cannot_use_are_refused(name):
    scheme, refusal = schemes.get(name).at(0), "1 shortcuts, want none|one continuous stream"
    fs = [torch.sin] if scheme.nodes is None else smooth_functions(scheme, 4, 1)[0]
    with pytest.raises(schemes.SchemeError, match=refusal):
        scheme._step(fs, scheme.init(fs, normal(1, 4)), gs=(torch.nn.Identity(),))


def test_shortcuts_are_given_all_or_none():
    scheme = schemes.get("revnet")
    with pytest.raises(schemes.SchemeError, match="1 shortcuts, want none or 2"):
        scheme._step((torch.sin, torch.cos), scheme.init((), normal(1, 4)), gs=(torch.nn.Identity(),))


@pytest.mark.parametrize("name", ["revcol", "dense(2)", "leapfrog", "momentum", "reversible(rk4)"])
def test_an_output_that_does_not_tell_the_streams_is_refused_as_the_start_of_an_inverse(name):
    with pytest.raises(schemes.SchemeError, match="does not determine its streams"):
        schemes.get(name).state_from_output(normal(2, 4))


@pytest.mark.parametrize("name", ["revcol", "dense(2)"])
def test_terms_leave_alone_the_streams_that_are_made(name):
    """The engine asks for them after the step, with the new streams in place."""
    scheme = schemes.get(name).at(0)
    fs = smooth_functions(scheme, 4, 1)[0]
    after = scheme._step(fs, (normal(2, 4),))
    for u in scheme.updates(fs, 1.0, 1):
        assert torch.equal(u.terms(after)[1], after[u.dst])


def test_an_input_too_narrow_to_split_is_refused():
    scheme = schemes.get("additive(4)")
    with pytest.raises(schemes.SchemeError, match="into 4 streams"):
        scheme.init((), normal(1, 3))
    with pytest.raises(schemes.SchemeError, match="along dim=1"):
        scheme.init((), normal(5))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_function_of_an_additive_coupling_is_at_the_mean_time_of_what_it_is_given(n):
    """Of the n - 1 other streams those before it have moved from time 0 to 1, and those after it have not."""
    times = [[1.0 if j < i else 0.0 for j in range(n) if j != i] for i in range(n)]
    assert schemes.get(f"additive({n})").nodes == pytest.approx([sum(t) / len(t) for t in times])


@pytest.mark.parametrize("name", ["bdia", "bdia(1/4)", "repeat(bdia, 2)"])
def test_a_draw_for_each_sample_needs_samples(name):
    scheme = schemes.get(name)
    net = Stack([torch.nn.Tanh() for _ in range(2 * scheme.stages)], name)
    with pytest.raises(schemes.SchemeError, match=r"draws gamma for each sample, along the first.\n  Give a batch"):
        net(torch.tensor(1.0))
    assert net(torch.ones(1)).shape == (1,) and net.eval()(torch.tensor(1.0)).shape == ()
