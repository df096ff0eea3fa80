"""The worked examples of solving ODEs run for a few steps, and learn."""

import pytest
import torch
from scripts import ROOT, load

FOLDER = ROOT / "experiments/ode"


def test_every_example_has_a_test_and_opens_with_its_command():
    for path in FOLDER.glob("*.py"):
        text = path.read_text("utf-8")
        assert path.stem in ("flow", "lotka_volterra")
        assert f"python experiments/ode/{path.name}" in text and "Expect:" in text


def test_a_flow_knows_its_density():
    """An untrained flow already is a density: it integrates to one, and sampling undoes it."""
    flow = load("experiments/ode/flow.py")
    torch.manual_seed(0)
    net = flow.Flow(rtol=1e-6)
    side = torch.linspace(-6, 6, 81)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        mass = net.log_density(grid, exact=True).exp().sum() * float(side[1] - side[0]) ** 2
    assert float(mass) == pytest.approx(1, abs=1e-2)
    rings = flow.Rings()
    x = torch.cartesian_prod(torch.linspace(-4, 4, 401), torch.linspace(-4, 4, 401))
    assert float(rings.log_density(x).exp().sum()) * 0.02**2 == pytest.approx(1, abs=1e-2)
    assert net.sample(8).shape == (8, 2)


def test_the_flow_trains(capsys):
    flow = load("experiments/ode/flow.py")
    torch.manual_seed(0)
    _, losses = flow.train(12, batch=64)
    assert losses[-1] < losses[0] - 0.1
    assert flow.main(["--steps", "2", "--points", "50"]) > 0
    assert "log-likelihood of new points" in capsys.readouterr().out


@pytest.mark.long
def test_the_rates_come_closer(capsys):
    example = load("experiments/ode/lotka_volterra.py")
    worst = example.main(["--steps", "6", "--observations", "30", "--noise", "0.01"])
    assert worst < 0.2  # the guess is 25 % off
    assert "predators' death d" in capsys.readouterr().out
