"""The shape of a model without its weights: its `config.json` from this machine, from the table here, or from the hub."""

import pathlib
from typing import Any

from huggingface_hub import try_to_load_from_cache

from eesd_jax.model.config import ModelConfig
from eesd_jax.weights import gguf, hub, safetensors, tiny

# What their config.json says, as far as `ModelConfig.from_hf` reads it, by hub id: the models of configs/ are gated.
_LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
CONFIGS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA3
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "meta-llama/Llama-2-13b-chat-hf": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
    },
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA3
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}


def find_config(name: str) -> ModelConfig:
    """The shape of a model; a hub id that is neither on this machine nor in the table is asked for its `config.json` alone.

    Args:
      name: as for `load_model`.

    Raises:
      UserError: nothing by that name, or a config that cannot be used.
    """
    if name == tiny.TINY_NAME:
        return tiny.config()
    path = pathlib.Path(name).expanduser()
    if name == hub.DEMO_NAME or path.exists() or hub.looks_local(name):
        path = hub.find_model(name)
    if path.is_file():
        return ModelConfig.from_hf(gguf.GGUFSource(path).hf_config(), str(path))
    if not path.is_dir():
        cached = try_to_load_from_cache(name, "config.json")
        if not isinstance(cached, str) and name in CONFIGS:
            return ModelConfig.from_hf(CONFIGS[name], name)
        expected = f"expected an existing folder, a .gguf file, a hub id, or one of {', '.join(CONFIGS)}"
        path = pathlib.Path(cached).parent if isinstance(cached, str) else hub.fetch_repository(name, "model", expected, ["config.json"])
    return ModelConfig.from_hf(safetensors.read_config(path), str(path))
