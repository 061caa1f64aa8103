"""Datasets, journals and caches that were changed under our hands are refused in one line, or read as what they are."""

import json
import pathlib

import numpy as np
import pytest
import tiny
from etils import epath
from mutations import Reader, try_all

from eesd_jax.config import DataConfig
from eesd_jax.distill import data, examples, teacher
from eesd_jax.distill.loss import TopTokens
from eesd_jax.distill.response_journal import Journal
from eesd_jax.weights.branch_folder import config_hash

ROWS, LENGTH, TOP = 6, 8, 2
MODEL = tiny.loaded_model()
HIDDEN, VOCAB = MODEL.config.hidden_size, MODEL.config.vocab_size


def make_dataset(folder: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    records = []
    for i in range(8):
        tokens = rng.integers(3, 300, 12).astype(np.int32)
        records.append({"tokens": tokens, "response": np.arange(12) >= 5, "index": i, "temperature": 0.0, "prompt_id": str(i)})
    provenance = {
        "model": "tiny",
        "vocab_size": VOCAB,
        "tokenizer_hash": examples.tokenizer_hash(MODEL.tokenizer),
        "target_config_hash": config_hash(MODEL.config),
    }
    examples.write_dataset(folder / "dataset", {"train": records}, provenance)


def read_dataset(folder: pathlib.Path) -> None:
    rows = data.Rows(examples.open_source(str(folder / "dataset"), "train", MODEL, 0.0), DataConfig(sequence_length=64), MODEL)
    for index in range(len(rows)):
        row = rows[index]
        assert 0 <= row.tokens.min() <= row.tokens.max() < VOCAB


def make_chats(folder: pathlib.Path) -> None:
    chat = [{"role": "user", "content": "the quick"}, {"role": "assistant", "content": "brown fox"}]
    (folder / "chats.json").write_text(json.dumps({"messages": chat}))


def read_chats(folder: pathlib.Path) -> None:
    data.Rows(examples.open_source(str(folder / "chats.json"), "train", MODEL, 0.0), DataConfig(sequence_length=64), MODEL)


def cache_in(folder: pathlib.Path) -> teacher.FeatureCache:
    provenance = {"model": "abc", "dtype": "float16"}
    return teacher.FeatureCache(folder / "cache", provenance, ROWS, LENGTH, MODEL.config, top=TOP, last=True)


def make_cache(folder: pathlib.Path) -> None:
    some = data.Batch(*(np.zeros(LENGTH, np.int32) for _ in range(4)), np.int32(0))
    rng = np.random.default_rng(0)

    def compute(batch: data.Batch) -> teacher.Features:
        shape = batch.tokens.shape
        values = rng.standard_normal((*shape, HIDDEN)).astype(np.float16)
        top = TopTokens(rng.integers(0, VOCAB, (*shape, TOP)), -np.ones((*shape, TOP), np.float16))
        return teacher.Features(values, values, top)

    list(cache_in(folder).fill([some] * ROWS, 2, compute))


def read_cache(folder: pathlib.Path) -> None:
    cache = cache_in(folder)
    assert 0 <= cache.rows <= ROWS
    if cache.complete:
        found = cache.read(np.arange(ROWS), LENGTH)
        assert found.hidden.shape == found.last.shape == (ROWS, LENGTH, HIDDEN)
        assert 0 <= found.top.ids.min() <= found.top.ids.max() < VOCAB


def journal_in(folder: pathlib.Path) -> Journal:
    return Journal(epath.Path(folder / "journal"), {"temperature": 1.0}, {"model": "abc"}, 0, "runs/x")


def make_journal(folder: pathlib.Path) -> None:
    journal = journal_in(folder)
    for i in range(6):
        journal.append({"index": i, "user": f"text {i}"})
        journal.append({"index": i, "tokens": [3, 4, 5, 2], "ended": True})


def read_journal(folder: pathlib.Path) -> None:
    journal = journal_in(folder)
    for index, answer in journal.answers.items():
        assert index >= 0
        assert answer.tokens.dtype == np.int32
        assert answer.tokens.ndim == 1
        assert answer.tokens.size == 0 or answer.tokens.min() >= 0
    assert all(index >= 0 and isinstance(text, str) for index, text in journal.users.items())


READERS = {
    "dataset": Reader(
        make_dataset,
        tuple(
            f"dataset/{name}" for name in ("dataset_info.json", "features.json", "metadata.json", "self_generated-train.array_record-00000")
        ),
        read_dataset,
        4000,
    ),
    "chats": Reader(make_chats, ("chats.json",), read_chats),
    "cache": Reader(
        make_cache,
        tuple(f"cache/{name}" for name in ("provenance.json", "rows_done", "ids.npy", "hidden.npy", "log_probs.npy")),
        read_cache,
        128,
    ),
    "journal": Reader(make_journal, ("journal/00000.jsonl", "journal/settings.json", "journal/target.json"), read_journal),
}


@pytest.mark.parametrize("name", READERS)
def test_a_few_dozen_mutations(tmp_path, name):
    try_all(READERS[name], tmp_path, range(40))


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_two_thousand_mutations(tmp_path, name):
    found = try_all(READERS[name], tmp_path, range(2000))
    print(f"| {name} | {found['refused']:,} | {found['read']:,} |")
