"""Intermediate supervision: the published weights, and training that lets the losses fall."""

from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from odenets.models import RevCol, Supervised
from odenets.training import Classifier, SupervisedClassifier, SupervisionLoss
from schemes import SchemeError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*smaller than the logging interval", "ignore:.*treespec, LeafSpec"
)


def test_published_weights():
    assert SupervisionLoss().weights(4) == ([3.0, 2.0, 1.0], [0.175, 0.35, 0.525, 1.0])
    assert SupervisionLoss().weights(1) == ([], [1.0])
    assert SupervisionLoss(pictures=[2.0], labels=[0.5, 0.7]).weights(2) == ([2.0], [0.5, 0.7])
    with pytest.raises(SchemeError, match="1 weights of pictures and 4 of labels for 3 decoders and 4 heads"):
        SupervisionLoss(pictures=[2.0]).weights(4)


def test_the_loss_is_the_written_out_sum():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 2, 1, 1])
    out = Supervised(tuple(torch.randn(4, 3) for _ in range(3)), tuple(torch.randn(4, 3, 8, 8) for _ in range(2)))
    picture = x * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    picture = picture.clamp(0, 1).clamp(0.01, 0.99)
    a, b = (F.binary_cross_entropy(image.sigmoid(), picture) for image in out.images)
    c, d, e = (F.nll_loss(logits.log_softmax(1), y) for logits in out.logits)
    want = 3 * a + 1.5 * b + 0.7 / 3 * c + 1.4 / 3 * d + e
    torch.testing.assert_close(SupervisionLoss(mean=mean, std=std)(out, x, y), want)
    soft = F.one_hot(y, 3).float()
    torch.testing.assert_close(SupervisionLoss(mean=mean, std=std)(out, x, soft), want)


def test_every_head_is_smoothed():
    x, y = torch.zeros(4, 3, 8, 8), torch.tensor([0, 2, 1, 1])
    out = Supervised(tuple(torch.randn(4, 3) for _ in range(2)), ())
    log_p = [logits.log_softmax(1) for logits in out.logits]
    a, b = (-(0.7 * p[torch.arange(4), y] + 0.3 * p.mean(1)).mean() for p in log_p)
    loss = SupervisionLoss(pictures=[0.0], labels=[0.5, 1.0], label_smoothing=0.3)
    torch.testing.assert_close(loss(Supervised(out.logits, (torch.zeros(4, 3, 8, 8),)), x, y), 0.5 * a + b)


@pytest.mark.long
@pytest.mark.parametrize("backprop", ["store", "reverse"])
def test_the_losses_fall(backprop, tmp_path):
    torch.manual_seed(0)
    x, y = torch.rand(32, 3, 16, 16), torch.arange(32) % 4
    x[:, 0] += y.view(-1, 1, 1) / 2  # the label is a shade of red
    net = RevCol((8, 16), (1, 1), columns=3, num_classes=4, supervision=True, backprop=backprop, patch=2)
    model = SupervisedClassifier(
        net=net, optimizer=partial(torch.optim.AdamW, lr=2e-2), mean=(0.0,) * 3, std=(1.0,) * 3
    )
    loss = SupervisionLoss(mean=(0.0,) * 3, std=(1.0,) * 3)
    with torch.no_grad():
        before = loss(net.forward_supervised(x), x, y)
    trainer = L.Trainer(
        max_epochs=15, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32)
    trainer.fit(model, data, data)
    out = net.forward_supervised(x)
    after = loss(out, x, y)
    assert after < 0.85 * before
    assert F.cross_entropy(out.logits[-1], y) < 0.7 * F.cross_entropy(torch.zeros(32, 4), y)


def test_without_supervision_it_trains_as_a_classifier_does(tmp_path):
    x, y = torch.rand(8, 3, 16, 16), torch.arange(8) % 4
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    found = []
    for kind in (Classifier, SupervisedClassifier):
        torch.manual_seed(0)
        net = RevCol((8, 16), (1, 1), columns=2, num_classes=4, supervision=False, patch=2)
        model = kind(net=net, optimizer=partial(torch.optim.AdamW, lr=2e-2), label_smoothing=0.1)
        trainer = L.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, data, data)
        found.append(net.state_dict())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(a, b) for a, b in zip(*(f.values() for f in found), strict=True))


def test_a_network_that_never_has_heads_in_its_middle_is_refused():
    with pytest.raises(SchemeError, match=r"Linear has no heads in its middle.*\n  Train it by odenets"):
        SupervisedClassifier(net=torch.nn.Linear(2, 2), optimizer=partial(torch.optim.SGD, lr=0.1))
