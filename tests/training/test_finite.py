"""A step that gave no number is repeated as it was: frozen norms stay frozen."""

from functools import partial

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from odenets.training import Classifier, Constant, Refinement
from odenets.training.data import Cached
from odenets.training.finite import FiniteLoss, NotFinite, repeat
from odenets.training.translation import Grammar, Translator

from .test_classifier import Random, sgd
from .test_processes import Words
from .test_refinement import net


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


class Eights(Random):
    def setup(self, stage):
        data = Cached(torch.rand(self.n, 1, 8, 8), torch.arange(self.n) % self.num_classes)
        self.sets = {"train": data, "val": data, "test": data}


def stopped(tmp_path, module, data, **options):
    """Trains until the loss is not finite; returns the file."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    quiet |= {"enable_model_summary": False, "default_root_dir": tmp_path, "limit_val_batches": 0}
    callbacks = [*options.pop("callbacks", []), FiniteLoss(tmp_path)]
    with pytest.raises(NotFinite):
        L.Trainer(**{"max_epochs": 3, **quiet, **options}, callbacks=callbacks).fit(module, data)
    return tmp_path / "not_finite.pt"


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
def test_repeat_computes_in_the_precision_of_the_run(tmp_path, precision):
    seen, again = [], []
    module, other = classifier(), classifier()
    for one, noted in ((module, seen), (other, again)):
        one.net[3].register_forward_hook(lambda m, args, y, noted=noted: noted.append(y.detach().clone()))
    with torch.no_grad():
        module.net[5].bias[0] = float("inf")
    path = stopped(tmp_path, module, Eights(), precision=precision)
    loss = repeat(other, path)
    assert not loss.isfinite() and torch.equal(again[-1], seen[-1]) and again[-1].dtype == seen[-1].dtype
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_repeat_takes_the_steps_of_the_run(tmp_path):
    seen, again = [], []
    module, other = Classifier(net(), sgd), Classifier(net(), sgd)
    for one, noted in ((module, seen), (other, again)):
        one.net[2].register_forward_hook(lambda m, args, y, noted=noted: noted.append(y.detach().clone()))

    class Breaks(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.net[4].bias.data[0] = float("inf")

    path = stopped(tmp_path, module, Random(), callbacks=[Refinement(at=[1], schemes=["rk4"]), Breaks()])
    assert not repeat(other, path).isfinite() and torch.equal(again[-1], seen[-1])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_step_of_a_translator_is_repeated(tmp_path):
    data, made = Grammar(sentences=200), []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(Translator(Words(), partial(torch.optim.SGD, lr=1e38), Constant()))
    path = stopped(tmp_path, made[0], data)
    assert not repeat(made[1], path).isfinite()
