"""Parallel text: what is found in files, what is left out, and that missing data is told with its remedies."""

from functools import partial

import pytest
import torch

from odenets.models.revcol_seq import PAD
from odenets.training import DataError, Images
from odenets.training.parallel_text import WORDS, ParallelText, to_text, to_words

from .texts import sentences, write_texts


@pytest.mark.parametrize("text", ["", "plain", "größer", "日本語", "\x00\x7f"])
def test_words_are_bytes_and_read_back(text):
    words = to_words(text)
    assert to_text(words.tolist()) == text
    assert len(words) == len(text.encode()) + 2 and int(words.max()) < WORDS


@pytest.mark.parametrize("flat", [True, False])
def test_batches_hold_the_sentences_of_the_file(tmp_path, flat):
    write_texts(tmp_path / "train.parquet", 12, flat)
    write_texts(tmp_path / "validation.parquet", 3, flat)
    data = ParallelText(root=str(tmp_path), batch_size=3)
    data.setup("fit")
    (source, target), *others = data.val_dataloader()
    assert not others and len(data.sets["train"]) == 12
    assert [(to_text(s), to_text(t)) for s, t in zip(source.tolist(), target.tolist(), strict=True)] == sentences(3)
    turned = ParallelText("de", "en", root=str(tmp_path), batch_size=3)
    turned.setup("fit")
    assert torch.equal(next(iter(turned.val_dataloader()))[1], source)


def test_shorter_sentences_are_padded(tmp_path):
    write_texts(tmp_path / "train.parquet", 12)
    write_texts(tmp_path / "test.parquet", 12)
    data = ParallelText(root=str(tmp_path), batch_size=12)
    data.setup("fit")
    source, _ = next(iter(data.val_dataloader()))  # the last two have a digit more
    assert (source == PAD).any(1).tolist() == [True] * 10 + [False] * 2


def test_long_pairs_are_left_out_and_pairs_are_held_out(tmp_path):
    write_texts(tmp_path / "train.parquet", 20)
    data = ParallelText(root=str(tmp_path), holdout=0.2, length=len(b"sentence 1 is small") + 2)
    data.setup("fit")  # from sentence 10 on they are too long
    assert (len(data.sets["train"]), len(data.sets["val"])) == (8, 2)
    seen = {to_text(s.tolist()) for part in data.sets.values() for s, _ in (part[i] for i in range(len(part)))}
    assert seen == {s for s, _ in sentences(10)}


@pytest.mark.parametrize("only", ["validation", "test", "other"])
def test_a_split_of_any_name_is_not_both_trained_on_and_validated_on(tmp_path, only):
    write_texts(tmp_path / f"{only}-00000-of-00001.parquet", 10)
    data = ParallelText(root=str(tmp_path), holdout=0.2)
    data.setup("fit")
    train, val = ({to_text(s.tolist()) for s, _ in (part[i] for i in range(len(part)))} for part in data.sets.values())
    assert (len(train), len(val)) == (8, 2) and not train & val


def test_missing_data_is_told_with_its_remedies(tmp_path):
    for options, told in (
        ({}, "no data"),
        ({"root": str(tmp_path / "none")}, "no folder"),
        ({"root": str(tmp_path)}, "no parquet files"),
        ({"hub": "nobody/nothing"}, "downloading was not allowed"),
    ):
        with pytest.raises(DataError, match=told) as e:
            ParallelText(**options)
        assert "--data.root FOLDER (parquet files)" in str(e.value) and "--data.download true" in str(e.value)
    write_texts(tmp_path / "train.parquet", 3)
    with pytest.raises(DataError, match=r"no column fr or translation\.fr"):
        ParallelText("en", "fr", root=str(tmp_path))
    short = ParallelText(root=str(tmp_path), length=4)
    with pytest.raises(DataError, match=r"0 pairs fit 4 words; give --data.length"):
        short.setup("fit")


@pytest.mark.parametrize("kind", [ParallelText, Images, partial(Images, streaming=True)])
@pytest.mark.parametrize("there", [True, False])
def test_a_folder_and_a_dataset_of_the_hub_are_two_sources(tmp_path, kind, there):
    root = tmp_path / "a"
    if there:
        root.mkdir()
        write_texts(root / "train.parquet", 8)
    with pytest.raises(DataError, match=r"a' and data.hub: 'b/c' are two sources.*\n  Give one.*--data.hub null"):
        kind(root=str(root), hub="b/c")
