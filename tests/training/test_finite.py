"""A step that gave no number is repeated as it was: frozen norms stay frozen."""

from functools import partial

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from odenets.training import Classifier
from odenets.training.finite import FiniteLoss, NotFinite, repeat


class Frozen(L.Callback):
    """Freezes the first norm, as fine-tuning does, in each step anew: Lightning calls train() on the whole module."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.net[1].eval()


def classifier():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    net.append(nn.Linear(64, 3))
    return Classifier(net, optimizer=partial(torch.optim.SGD, lr=0.1))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # Lightning's own, of a run so small
def test_repeat_wakes_no_frozen_norm(tmp_path):
    data = TensorDataset(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]))
    seen = []
    module = classifier()
    module.net[3].register_forward_hook(lambda m, args, y: seen.append(y.detach().clone()))
    with torch.no_grad():
        module.net[5].bias[0] = float("inf")  # what comes before the last layer stays finite, and tells the modes apart
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[Frozen(), FiniteLoss(tmp_path)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(NotFinite):
        trainer.fit(module, DataLoader(data, batch_size=4))
    again, repeated = classifier(), []
    again.net[3].register_forward_hook(lambda m, args, y: repeated.append(y.detach().clone()))
    again.net[1].register_forward_hook(lambda m, args, y: repeated.append(m.running_mean.clone()))
    before = torch.load(tmp_path / "not_finite.pt", weights_only=True)["state_dict"]["net.1.running_mean"].clone()
    loss = repeat(again, tmp_path / "not_finite.pt")
    assert not loss.isfinite() and not again.net[1].training and again.net[3].training and again.training
    torch.testing.assert_close(repeated[0], before)  # frozen statistics do not move
    torch.testing.assert_close(repeated[1], seen[-1])
