"""Translation with a RevCol encoder: masks, the synthetic language, and a short training."""

from functools import partial

import lightning as L
import pytest
import torch

from odenets.models.revcol_seq import END, PAD, START, RevColTranslator
from odenets.training.translation import (
    _AGREES,
    _N,
    _OBJECT,
    _V,
    TARGET_WORDS,
    THAT,
    WORDS,
    Grammar,
    Translator,
    sentence,
)
from schemes import SchemeError

SMALL = {"dim": 16, "heads": 2, "blocks": (1, 1), "columns": 2, "decoder_layers": 1, "length": 32}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*smaller than the logging interval", "ignore:.*LeafSpec"
)


@pytest.mark.parametrize("backprop", ["store", "reverse"])
def test_padding_and_later_words_change_nothing(backprop):
    net = RevColTranslator(WORDS, TARGET_WORDS, **SMALL, backprop=backprop).double()
    source, target = torch.randint(3, WORDS, (2, 6)), torch.randint(3, TARGET_WORDS, (2, 5))
    want = net(source, target)
    padded = torch.cat([source, torch.full((2, 4), PAD)], 1)
    torch.testing.assert_close(net(padded, target), want)
    changed = target.clone()
    changed[:, 3:] = END
    torch.testing.assert_close(net(source, changed)[:, :3], want[:, :3])
    assert not torch.allclose(net(source.flip(1), target), want)
    net(padded, target).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_translate_ends_after_the_end():
    net = RevColTranslator(WORDS, TARGET_WORDS, **SMALL).eval()
    words = net.translate(torch.randint(3, WORDS, (3, 6)), 12)
    assert words.shape[1] <= 11
    for row in words.tolist():
        if END in row:
            assert set(row[row.index(END) + 1 :]) <= {PAD}
    with pytest.raises(SchemeError, match="has 33 words, the longest may have 32"):
        net(torch.ones(1, 33, dtype=torch.long), torch.ones(1, 3, dtype=torch.long))
    for limit in (0, -3, 33, True, 2.5):
        with pytest.raises(SchemeError, match=f"limit is {limit}, want a whole number from 1 to 32"):
            net.translate(torch.ones(1, 3, dtype=torch.long), limit)
    with pytest.raises(SchemeError, match="at least one of each"):
        RevColTranslator(9, 9, columns=0)


def test_the_grammar_moves_the_verb_marks_the_object_and_agrees():
    random = torch.Generator().manual_seed(1)
    simple = [pair for pair in (sentence(random) for _ in range(300)) if THAT not in pair[0]]
    assert len(simple) > 50
    for s, t in simple:
        assert len(s) == len(t)
        nouns = [w - _N for w in s if _N <= w < _V]
        subject, object_ = nouns
        (verb,) = [w - _V for w in s if _V <= w < _V + _AGREES - _OBJECT and w < _V + 8]
        assert t[0] == _N + subject and _OBJECT + object_ in t
        assert t[-1] == (_AGREES if subject % 2 else _V) + verb
    data = Grammar(50, 10)
    data.setup("fit")
    seen = {tuple(s.tolist()) for s, _ in data.train_set}
    assert len(seen) == 50 and not any(tuple(s.tolist()) in seen for s, _ in data.val_set)
    assert data.train_set[0][1][0] == START


@pytest.mark.long
def test_the_loss_falls(tmp_path):
    L.seed_everything(0, verbose=False)
    net = RevColTranslator(WORDS, TARGET_WORDS, **{**SMALL, "dim": 32}, backprop="reverse")
    model = Translator(net, partial(torch.optim.AdamW, lr=4e-3))
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=1, num_sanity_val_steps=0, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, Grammar(600, 32, length=24))
    assert trainer.callback_metrics["val/loss"] < 2.9 < torch.tensor(float(TARGET_WORDS)).log()
    assert trainer.callback_metrics["val/acc"] > 0.2
