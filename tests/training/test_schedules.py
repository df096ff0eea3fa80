"""Learning rates at each step beside torch's, timm's and exact fractions."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from odenets.training import Milestones, OneCycle, WarmupCosine
from schemes import SchemeError


def rates(schedule, steps, per_epoch=1):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5, momentum=0.9)
    scheduler, found = schedule(optimizer, steps, per_epoch), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_milestones_are_at_the_first_step_that_is_not_before_their_share():
    for share in {Fraction(k, d) for d in (3, 7, 20) for k in range(1, d)}:
        schedule = Milestones((float(share),))
        for steps in range(1, 251):
            at = math.ceil(share * steps)
            assert schedule.factor_at(at, steps) == 0.1 and schedule.factor_at(at - 1, steps) == 1.0, (share, steps)


@pytest.mark.parametrize("up", [0.05, 0.1, 0.2, 0.25, 0.3, 0.5, 0.99])
def test_one_cycle_is_torchs_for_runs_of_any_length(up):
    for steps in (1, 2, 3, 4, 9, 19, 24):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5, momentum=0.9)
        nothing = up * (steps + 1) == 1  # torch divides by the length of the rise
        more = {"total_steps": steps + 1, "pct_start": up + 1e-7 * nothing}
        theirs, want = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, **more), []
        for _ in range(steps):
            want.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            theirs.step()
        assert rates(OneCycle(up), steps) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("kind", ["SGD", "RMSprop", "Adam", "AdamW", "NAdam"])
@pytest.mark.parametrize("own", [0.0, 0.5])
def test_one_cycle_moves_a_momentum_that_there_is(kind, own):
    option = {"momentum": own} if kind in ("SGD", "RMSprop") else {"betas": (own, 0.99)}
    for moves in (True, False):
        optimizer = getattr(torch.optim, kind)([nn.Parameter(torch.zeros(1))], lr=0.5, **option)
        if moves and not own:
            with pytest.raises(SchemeError, match=f"that of {kind} is 0\n  Give --model.schedule.momentum false"):
                OneCycle(momentum=moves)(optimizer, 8, 2)
            moves = False  # and nothing was moved
        else:
            OneCycle(momentum=moves)(optimizer, 8, 2)
        (group,) = optimizer.param_groups
        assert (group["betas"][0] if "betas" in option else group["momentum"]) == (0.95 if moves else own)


@pytest.mark.torchvision
def test_the_fall_of_a_cosine_is_timms():
    timm = pytest.importorskip("timm.scheduler")
    for steps, warm, final in ((8, 0, 0.0), (8, 3, 0.1), (40, 20, 0.0), (41, 5, 0.5)):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
        options = {"warmup_t": warm, "warmup_lr_init": 0.1, "warmup_prefix": True, "t_in_epochs": False}
        theirs, want = timm.CosineLRScheduler(optimizer, steps - warm, lr_min=0.5 * final, **options), []
        for i in range(steps):
            theirs.step_update(i)
            want.append(optimizer.param_groups[0]["lr"])
        got = rates(WarmupCosine(warm, final), steps)
        # Theirs rises from a rate of its own, and reaches the peak a step later.
        assert got[warm:] == pytest.approx(want[warm:], rel=1e-12) and got[:warm] == pytest.approx(
            [0.5 * (i + 1) / max(1, warm) for i in range(warm)]
        )
