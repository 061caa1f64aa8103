"""Tiny models for tests: configurations, random weights under Hugging Face names, and the folders and GGUF files that hold them.

hf = tiny.hf_config("qwen2", tie_word_embeddings=True)  # as in config.json
config = tiny.config("qwen2", tie_word_embeddings=True)
params = tiny.params(config)
folder = tiny.write_folder(tmp_path / "model", hf)
file = tiny.write_gguf(tmp_path / "model.gguf", hf)
model = tiny.loaded_model()
"""

import functools
import json
import pathlib
from typing import Any

import gguf
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  teaches numpy the name "bfloat16"
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from eesd_jax.model import llama
from eesd_jax.model.config import ModelConfig
from eesd_jax.weights.load import LoadedModel, load_params

VOCAB_SIZE = 320
END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TRAINING_TEXT = "the quick brown fox jumps over the lazy dog; hello world, hello there: 12 345 6789 don't we'll\n\n  indented   text\n" * 3


def hf_config(model_type: str = "llama", **overrides: Any) -> dict[str, Any]:
    """The contents of a `config.json`: 3 blocks, hidden size 32, 4 heads over 2; rows fit the quantized blocks of GGUF."""
    config = {
        "architectures": ["ForCausalLM"],
        "model_type": model_type,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "eos_token_id": 2,
    }
    return config | overrides


def config(model_type: str = "llama", **overrides: Any) -> ModelConfig:
    """`ModelConfig` of `hf_config`."""
    return ModelConfig.from_hf(hf_config(model_type, **overrides), "tiny")


def tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights under their Hugging Face names; norms and biases are random too, so that a forgotten one shows."""
    hidden, mlp, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_heads * head_dim, config.num_kv_heads * head_dim
    shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        block = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        matrices = {
            "self_attn.q_proj": ((heads, hidden), config.qkv_bias),
            "self_attn.k_proj": ((kv_heads, hidden), config.qkv_bias),
            "self_attn.v_proj": ((kv_heads, hidden), config.qkv_bias),
            "self_attn.o_proj": ((hidden, heads), config.out_bias),
            "mlp.gate_proj": ((mlp, hidden), config.mlp_bias),
            "mlp.up_proj": ((mlp, hidden), config.mlp_bias),
            "mlp.down_proj": ((hidden, mlp), config.mlp_bias),
        }
        for name, (shape, has_bias) in matrices.items():
            block[f"{name}.weight"] = shape
            if has_bias:
                block[f"{name}.bias"] = shape[:1]
        if config.qk_norm:
            block |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 2:
            return values * np.float32(shape[1] ** -0.5)
        return values * np.float32(0.3) + np.float32("norm" in name)

    return {name: draw(name, shape) for name, shape in shapes.items()}


class ArraySource:
    """Weights that are in memory already, as a source for `load_params`."""

    description = "tiny"

    def __init__(self, tensors: dict[str, np.ndarray]):
        self._tensors = tensors
        self.shapes = {name: value.shape for name, value in tensors.items()}

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name]


def params(config: ModelConfig, seed: int = 0, dtype: Any = jnp.float32) -> llama.Params:
    """Random params of a model; the same as those loaded from `write_folder` and `write_gguf` with that seed."""
    return load_params(config, ArraySource(tensors(config, seed)), jnp.dtype(dtype))


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens with single digits (SmolLM's kind) and a ChatML template: any text in, the same text out."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in (END, TURN_START, TURN_END)]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator([_TRAINING_TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=TURN_START, eos_token=TURN_END, pad_token=END, unk_token=END, chat_template=CHAT_TEMPLATE
    )


def loaded_model(model_type: str = "llama", seed: int = 0, dtype: Any = jnp.float32, **overrides: Any) -> LoadedModel:
    """A model ready for `Engine`: random weights and the tiny tokenizer."""
    model_config = config(model_type, **overrides)
    return LoadedModel(model_config, params(model_config, seed, dtype), tokenizer(), (tokenizer().eos_token_id,))


def write_folder(
    folder: pathlib.Path, hf: dict[str, Any], *, seed: int = 0, dtype: str = "float32", shards: int = 1, with_tokenizer: bool = False
) -> pathlib.Path:
    """Writes a Hugging Face folder with the weights `tensors(config, seed)`, as one file or as shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf))
    stored = {name: value.astype(dtype) for name, value in tensors(ModelConfig.from_hf(hf, "tiny"), seed).items()}
    if shards == 1:
        save_file(stored, folder / "model.safetensors")
    else:
        weight_map = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(stored)}
        for file in set(weight_map.values()):
            save_file({name: value for name, value in stored.items() if weight_map[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if with_tokenizer:
        tokenizer().save_pretrained(folder)
    return folder


def write_gguf(
    path: pathlib.Path,
    hf: dict[str, Any],
    *,
    seed: int = 0,
    matrix_type: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    fields: dict[str, Any] | None = None,
    extra_tensors: dict[str, np.ndarray] | None = None,
) -> pathlib.Path:
    """Writes a GGUF file with the weights `tensors(config, seed)`, as llama.cpp's converter would.

    Args:
      matrix_type: how weights of two axes are stored; the others are F32.
      fields: metadata to add or replace; None takes a field away. By default the model's own and the tiny tokenizer's are written.
      extra_tensors: F32 tensors under their GGUF names.
    """
    config = ModelConfig.from_hf(hf, "tiny")
    architecture = "llama" if config.architecture == "mistral" else config.architecture
    writer = gguf.GGUFWriter(path, architecture)
    model_fields = {
        "context_length": config.context_length,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope.theta,
    }
    all_fields = {f"{architecture}.{name}": value for name, value in model_fields.items()} | gguf_tokenizer(tokenizer()) | (fields or {})
    for name, value in all_fields.items():
        add_field(writer, name, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_layers)
    for name, value in tensors(config, seed).items():
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            # The converter turns the two halves of each head into neighbouring pairs.
            heads = config.num_heads if ".q_proj." in name else config.num_kv_heads
            value = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        kind = matrix_type if value.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), gguf.quantize(value, kind), raw_dtype=kind)
    for name, value in (extra_tensors or {}).items():
        writer.add_tensor(name, value.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_field(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    """Adds one metadata field of the type that fits the Python value; None adds nothing."""
    match value:
        case None:
            pass
        case bool():
            writer.add_bool(name, value)
        case int():
            writer.add_uint32(name, value)
        case float():
            writer.add_float32(name, value)
        case str():
            writer.add_string(name, value)
        case _:
            writer.add_array(name, value)


def gguf_tokenizer(tokenizer: PreTrainedTokenizerBase, pre: str = "smollm") -> dict[str, Any]:
    """The metadata fields that describe a byte-level BPE tokenizer in a GGUF file."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    control = set(tokenizer.all_special_ids)
    ids = range(len(tokenizer))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokenizer.convert_ids_to_tokens(list(ids)),
        "tokenizer.ggml.token_type": [3 if i in control else 1 for i in ids],
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
