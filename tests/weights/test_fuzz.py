"""Whatever stands in a file, reading it ends in one line or in a right result: no traceback, and no memory but some times the file's size.

Every case is a valid file with one to three changes (`tests/mutations.py`), by number.
"""

import functools
import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from families import FAMILIES, gguf_fields, spm, write
from mutations import Reader, try_all

from eesd_jax.decode.sources import ngrams
from eesd_jax.model.config import ModelConfig
from eesd_jax.model.exit_branch import init_exit_branch
from eesd_jax.weights.branch_folder import describe, load_branch, save_branch
from eesd_jax.weights.load import load_model
from eesd_jax.weights.ngram_file import check_ngrams, load_ngrams, save_ngrams
from eesd_jax.weights.tokenizer import from_folder

HF = tiny.hf_config(num_hidden_layers=1)
TEXT = "Hello  world 12\n<s>"


def read_model(path: pathlib.Path) -> None:
    model = load_model(str(path), jnp.dtype("float32"))
    encode(model.tokenizer)
    assert all(0 <= token < model.config.vocab_size for token in model.eos_ids)
    assert model.params["embed"].shape == (model.config.vocab_size, model.config.hidden_size)
    assert model.config.context_length > 0
    assert len(model.params["blocks"]) == model.config.num_layers


def encode(tokenizer) -> None:
    ids = tokenizer(TEXT).input_ids
    assert all(isinstance(token, int) and token >= 0 for token in ids)
    tokenizer.decode(ids, skip_special_tokens=True)
    assert tokenizer.eos_token_id is None or tokenizer.eos_token_id >= 0


def make_spm_gguf(folder: pathlib.Path) -> None:
    fields = gguf_fields(FAMILIES["Llama 2"][2](), None, "default") | {"tokenizer.ggml.merges": None}
    tiny.write_gguf(folder / "model.gguf", HF | {"vocab_size": 400}, fields=fields)


@functools.cache
def target() -> tuple[ModelConfig, Any]:
    return tiny.config(), tiny.params(tiny.config())


def make_branch(folder: pathlib.Path) -> None:
    config, params = target()
    branch = init_exit_branch(config, params, 2, "last", np.array([0, 3, 17, 200, 319]))
    info = describe(config, params, branch, exit_layer=2, start="last", calibration=(1.25, -0.5), training={"steps": 10})
    save_branch(folder, branch, info, in_bytes=True)


def read_branch(folder: pathlib.Path) -> None:
    loaded = load_branch(str(folder), *target())
    ids = np.asarray(loaded.branch.draft_ids)
    assert (np.diff(ids) > 0).all()
    assert 0 <= ids[0] <= ids[-1] < target()[0].vocab_size


def read_ngrams(folder: pathlib.Path) -> None:
    table = load_ngrams(folder / "ngrams.safetensors")
    check_ngrams(table, 320)
    assert table.entries.dtype == np.uint32
    assert (table.entries & ngrams.MAX_TOKEN).max() < 320


def make_model_file(folder: pathlib.Path) -> None:
    (folder / "tokenizer.model").write_bytes(spm())
    (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": False, "added_tokens_decoder": {"380": {"content": "<a>"}}}))
    (folder / "added_tokens.json").write_text(json.dumps({"<a>": 380}))


READERS = {
    "gguf": Reader(
        lambda folder: tiny.write_gguf(folder / "model.gguf", HF), ("model.gguf",), lambda folder: read_model(folder / "model.gguf"), 12_000
    ),
    "gguf of sentencepiece": Reader(make_spm_gguf, ("model.gguf",), lambda folder: read_model(folder / "model.gguf"), 12_000),
    "folder": Reader(
        lambda folder: tiny.write_folder(folder, HF, shards=2, with_tokenizer=True),
        ("config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"),
        read_model,
        1500,
    ),
    "tokenizer.json": Reader(
        lambda folder: write(folder, "Llama 2"), ("tokenizer.json", "tokenizer_config.json"), lambda folder: encode(from_folder(folder))
    ),
    "byte-level tokenizer.json": Reader(
        lambda folder: write(folder, "Qwen 2"), ("tokenizer.json", "tokenizer_config.json"), lambda folder: encode(from_folder(folder))
    ),
    "tokenizer.model": Reader(
        make_model_file, ("tokenizer.model", "tokenizer_config.json", "added_tokens.json"), lambda folder: encode(from_folder(folder))
    ),
    "branch": Reader(make_branch, ("config.json", "exit_branch.safetensors"), read_branch, 1500),
    "n-grams": Reader(
        lambda folder: save_ngrams(folder / "ngrams.safetensors", np.arange(64, dtype=np.uint32), 320, {"model": "tiny"}),
        ("ngrams.safetensors",),
        read_ngrams,
        200,
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_a_few_dozen_mutations(tmp_path, name):
    try_all(READERS[name], tmp_path, range(40))


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_two_thousand_mutations(tmp_path, name):
    found = try_all(READERS[name], tmp_path, range(2000))
    print(f"| {name} | {found['refused']:,} | {found['read']:,} |")
