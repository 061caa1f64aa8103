"""What tests of `infer/generate.py` share: the command in this process, models for it, and files to read and to write.

with generate_command.loaded(tmp_path / "cache") as command:
    result = command("--model=tiny", "--prompt=hello")
"""

import contextlib
import functools
import json
import pathlib
from collections.abc import Callable, Iterator

import commands
import pytest
import tiny

FIELDS = [
    *("id", "turn", "prompt", "text", "token_ids", "new_tokens"),
    *("rounds", "drafted", "accepted", "tokens_per_round", "seconds", "finish_reason"),
]
CONTEXT = tiny.hf_config()["max_position_embeddings"]
PROMPTS = ("hello", "the quick brown fox jumps", "a", "12 345\nlazy dog", "there: don't", "日本")


@contextlib.contextmanager
def loaded(cache: pathlib.Path) -> Iterator[Callable[..., commands.Result]]:
    """What runs the command in this process, as if with --exit_branch=none, which warns of nothing, and without lookup."""
    with pytest.MonkeyPatch.context() as patch, commands.loaded("infer/generate.py") as module:
        patch.setenv("EESD_JAX_CACHE", str(cache))
        yield functools.partial(commands.run, module, "--exit_branch=none", "--arms=exit")


def write_models(base: pathlib.Path) -> dict[str, str]:
    """Folders and files of models, whole and damaged."""
    hf = tiny.hf_config()
    tiny.write_folder(base / "folder", hf, with_tokenizer=True)
    whole = tiny.write_gguf(base / "whole.gguf", hf)
    tiny.write_gguf(base / "no_template.gguf", hf, fields={"tokenizer.chat_template": None})
    (base / "half.gguf").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    truncated = tiny.write_folder(base / "truncated", hf, shards=2, with_tokenizer=True)
    shard = truncated / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    no_weights = tiny.write_folder(base / "no_weights", hf, with_tokenizer=True)
    (no_weights / "model.safetensors").unlink()
    (base / "empty").mkdir()
    (base / "notes.txt").write_text("no model")
    return {path.name.removesuffix(".gguf"): str(path) for path in base.iterdir()}


def write_prompts(records: list, name: str = "prompts.jsonl") -> str:
    """A prompt file in the current folder."""
    pathlib.Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return name


def read_output(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]
