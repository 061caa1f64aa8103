"""Logits equal those of transformers + PyTorch (float32) for tiny random models of every family, in each way that ours can run."""

import copy
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from eesd_jax.model import cache as kv
from eesd_jax.model import llama, ops
from eesd_jax.model.config import ModelConfig
from eesd_jax.weights.load import load_params
from eesd_jax.weights.safetensors import INDEX_NAME, SafetensorsSource

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

BATCH, LENGTH = 2, 40
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def rope(kind: str, **parameters) -> dict:
    """Scaling of a context that is shorter than the sequence."""
    return {
        "rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16, **parameters}
    }


CASES = {
    "llama-mha": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    "llama-gqa-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 24}),
    "llama-rope-llama3": ("llama", rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
    "llama-rope-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}}),
    "llama-rope-yarn": ("llama", rope("yarn")),
    "llama-rope-yarn-attention-factor": ("llama", rope("yarn", attention_factor=0.7, beta_fast=4.0, beta_slow=0.5)),
    "llama-rope-yarn-mscale": ("llama", rope("yarn", mscale=0.7, mscale_all_dim=1.4, beta_slow=0.25, truncate=False)),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3-biases-windows": ("qwen3", {"attention_bias": True, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
}


def torch_model(case: str):
    """A random model, whose norms and biases are random too."""
    model_type, overrides = CASES[case]
    config = transformers.AutoConfig.for_model(model_type, **SHAPE | overrides)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
            else:
                weight.normal_(mean=float("norm" in name), std=0.3)
    return model


def load(folder: pathlib.Path) -> tuple[ModelConfig, llama.Params]:
    config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()), str(folder))
    return config, load_params(config, SafetensorsSource(folder), jnp.dtype("float32"))


def forward(config, params, tokens_BxT, start_B, cache):
    x, new = llama.forward_blocks(config, params["blocks"], llama.embed(params, tokens_BxT), start_B, cache, range(config.num_layers))
    return llama.logits(config, params, x), new


def step(config, params, tokens_BxT, start_B, cache):
    logits, new = forward(config, params, tokens_BxT, start_B, cache)
    return logits, kv.write(cache, new, start_B, logits)


def whole_pass(config, params, tokens):
    return jax.jit(forward, static_argnums=0)(config, params, tokens, jnp.zeros(BATCH, jnp.int32), None)[0]


def scanned(config, params, tokens):
    def run(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
        x = llama.scan_blocks(config, llama.stack_blocks(params["blocks"]), llama.embed(params, tokens), positions, ops.causal_mask(LENGTH))
        return llama.logits(config, params, x)

    return jax.jit(run)(params, tokens)


def cached(config, params, tokens):
    """Prefill, then several tokens at once, then one at a time; the second row is three tokens behind the first, as in a ragged batch."""
    behind = np.array([0, 3])
    run = jax.jit(step, static_argnums=0)
    cache = kv.empty(config, BATCH, LENGTH + 8, jnp.float32)
    logits = np.zeros((BATCH, LENGTH, config.vocab_size), np.float32)
    # What the second row's last places hold in the first pass is overwritten by the next one.
    start, widths = np.zeros(BATCH, np.int32), [18, 6] + [1] * (LENGTH - 18 - 6 + 3)
    for width in widths:
        at = start[:, None] + np.arange(width)
        out, cache = run(config, params, jnp.asarray(np.take_along_axis(tokens, np.minimum(at, LENGTH - 1), 1)), jnp.asarray(start), cache)
        for row in range(BATCH):
            fits = at[row] < LENGTH
            logits[row, at[row][fits]] = out[row, fits]
        start = start + width - (behind if not start.any() else 0)
    return logits


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: pathlib.Path):
    model = torch_model(case)
    model.save_pretrained(tmp_path)
    config, params = load(tmp_path)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (BATCH, LENGTH))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    for run in (whole_pass, cached, scanned):
        error = np.abs(np.asarray(run(config, params, tokens)) - expected).max() / np.abs(expected).max()
        assert error <= 1e-4, f"{run.__name__}: relative error {error:.1e}"


def test_shards_hold_the_same_params(tmp_path: pathlib.Path):
    model = torch_model("llama-gqa-tied")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(set(json.loads((tmp_path / "many" / INDEX_NAME).read_text())["weight_map"].values())) > 3
    assert jax.tree.all(jax.tree.map(np.array_equal, load(tmp_path / "one")[1], load(tmp_path / "many")[1]))


@pytest.mark.parametrize("case", CASES)
def test_config_spelled_as_by_transformers_4(case: str, tmp_path: pathlib.Path):
    model_type, overrides = CASES[case]
    transformers.AutoConfig.for_model(model_type, **SHAPE | overrides).save_pretrained(tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    old = copy.deepcopy(new)
    scaling = old.pop("rope_parameters")
    old["rope_theta"] = scaling.pop("rope_theta")
    old["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
    old.pop("layer_types", None)
    assert ModelConfig.from_hf(old, "old") == ModelConfig.from_hf(new, "new")
    if old["rope_scaling"]:
        scaling["type"] = scaling.pop("rope_type")  # the oldest spelling
        assert ModelConfig.from_hf(old, "old") == ModelConfig.from_hf(new, "new")
