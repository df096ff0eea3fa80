"""What only a CUDA device can show, ``pytest -m gpu``: the device's generator, fp16 autocast, figures in flight."""

from functools import partial

import pytest
import torch
from invertible import SCHEMES, Function, batch, build, distance, gradients
from torch import nn

from odenets import ContinuousWeights, create_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_device(name, **options):
    return build(name, dtype=torch.float32, **options).to("cuda")


def given():
    return batch(dtype=torch.float32, grad=False).to("cuda").requires_grad_()


@pytest.mark.parametrize("name", list(SCHEMES))
def test_reverse_equals_stored(name):
    want, found = (gradients(on_device(name, backprop=mode), given()) for mode in ("store", "reverse"))
    assert distance(found, want) < 1e-4


@pytest.mark.parametrize("name", ["revnet", "momentum(0.9)", "revcol"])
def test_dropout_of_the_device_is_replayed(name):
    found = []
    for mode in ("store", "reverse"):
        torch.cuda.manual_seed(0)
        net = on_device(name, backprop=mode, make=lambda slot: Function(slot, dropout=0.3))
        found.append((gradients(net, given()), torch.cuda.get_rng_state()))
    assert distance(found[1][0], found[0][0]) < 1e-4
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_is_the_same_the_second_time(dtype):
    found = []
    for mode in ("store", "reverse"):
        net = on_device("revnet", backprop=mode)
        with torch.autocast("cuda", dtype):
            y = net(given())
        y.float().square().mean().backward()
        found.append({k: p.grad for k, p in net.named_parameters()})
        assert {t for step in net.steps for f in step.fs for t in f.noted.dtypes} == {dtype}
    assert distance(found[1], found[0]) < 2e-2


@pytest.mark.parametrize("name", ["revnet", "momentum(0.9)"])
def test_exact_mode(name):
    a, b = (gradients(on_device(name, backprop=mode), given()) for mode in ("exact", "exact(store=true)"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_drift_arrives_without_waiting():
    net, x = on_device("revnet"), given()
    net(x).sum().backward()
    torch.cuda.synchronize()
    net(x)
    assert net.monitor.drift is not None and net.monitor.drift < 1e-3


def test_a_model_trains_in_bf16_and_channels_last():
    net = create_model("ho_resnet26", scheme="rk4").to("cuda").to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16):
        loss = net(x).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.filterwarnings("ignore")  # of Lightning: workers, intervals
def test_training_on_pictures_that_lie_on_the_device():
    """The data set and its batches are there, and the run is the one with pictures in host memory."""
    L = pytest.importorskip("lightning")
    from odenets.training import Classifier, Digits

    found = []
    for where in (False, True):
        L.seed_everything(0)
        model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), partial(torch.optim.SGD, lr=0.1))
        data = Digits(on_device=where)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        L.Trainer(accelerator="gpu", devices=1, max_epochs=1, **quiet).fit(model, datamodule=data)
        found.append(model.net[1].weight.detach().cpu())
    assert data.sets["train"].pictures.is_cuda and data.sets["train"].__getitems__([3])[0].is_cuda
    assert torch.allclose(*found, rtol=1e-5, atol=1e-6)


def test_a_field_is_fitted_and_projected_on_the_device():
    layers = [nn.Linear(4, 4) for _ in range(6)]
    want = ContinuousWeights.from_modules(layers, 3)
    found = ContinuousWeights.from_modules([layer.to("cuda") for layer in layers], 3)
    near, far = found.field.projected(2), want.field.projected(2)
    assert abs(found.error - want.error) < 1e-5 and abs(near.error - far.error) < 1e-5
    assert {p.device.type for p in near.field.parameters()} == {"cuda"}
