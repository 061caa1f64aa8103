"""Reads GGUF files: weights of every type that the `gguf` package dequantizes, and metadata brought into the form of a `config.json`.

Tensors appear under their Hugging Face names and in their Hugging Face order, so that everything behind this file knows one layout only.
"""

import math
import pathlib
from typing import Any

import gguf
import numpy as np

from eesd_jax.errors import UserError
from eesd_jax.model.stored import Codes
from eesd_jax.weights import gguf_reader

SUPPORTED_ARCHITECTURES = ("llama", "qwen2", "qwen3")

_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
_PIECE = 256  # rows dequantized at once
_TOGETHER = 16  # of them as one row
_ALIGNMENT = 64  # bytes
_REQUIRED_FIELDS = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)


class GGUFSource:
    """The tensors and metadata of one GGUF file, or of all the parts of one that is split: the path of any of them will do.

    Raises:
      UserError: not a GGUF file, truncated, without all its parts, or of an unsupported architecture.
    """

    def __init__(self, path: pathlib.Path):
        self.description = str(path)
        reader = gguf_reader.open_file(path)
        self._fields = reader.fields
        readers = [reader]
        if self.field("split.count", 1) not in (0, 1):  # 0 where parts have been merged
            readers = gguf_reader.open_parts(path, self.field("split.no", 0), self.field("split.count"))
            self._fields = readers[0].fields
        self.architecture = self.field("general.architecture")
        if self.architecture not in SUPPORTED_ARCHITECTURES:
            raise UserError(
                f"{path}: architecture {self.architecture!r} is not supported in GGUF files; "
                f"supported are {', '.join(SUPPORTED_ARCHITECTURES)}"
            )
        self._rope_factors = None
        self._tensors = {}
        for tensor in (tensor for reader in readers for tensor in reader.tensors):
            if tensor.name == _ROPE_FACTORS:
                self._rope_factors = tuple(float(x) for x in np.asarray(tensor.data).ravel())
            elif self._tensors.setdefault(_hf_name(tensor.name), tensor) is not tensor:
                raise UserError(f"{path}: tensor {tensor.name} stands twice in its parts")
        # GGUF lists the fastest axis first.
        self.shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()}

    def field(self, name: str, default: Any = None) -> Any:
        """A metadata value as a Python object, or `default` where the file has none."""
        field = self._fields.get(name)
        try:
            return default if field is None else field.contents()
        except (ValueError, IndexError) as error:  # of bytes that are no text, too
            raise UserError(f"{self.description}: metadata field {name} cannot be read ({error})") from None

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantized to float32, rows of q and k in Hugging Face order."""
        tensor = self._tensors[name]
        data = _aligned_empty(self.shapes[name])
        # As plain arrays (slices of a memory map cost more than the arithmetic on them), and in pieces, so that only the result is large.
        raw_rows = np.asarray(tensor.data).reshape(-1, tensor.data.shape[-1])
        rows = data.reshape(len(raw_rows), -1)
        try:
            for first in range(0, len(rows), _PIECE):
                piece = raw_rows[first : first + _PIECE]
                # The package takes 16 rows at a time; here every row is several, which whole blocks allow.
                longer = piece.reshape(len(piece) // math.gcd(len(piece), _TOGETHER), -1)
                rows[first : first + _PIECE] = gguf.dequantize(longer, tensor.tensor_type).reshape(len(piece), -1)
        except NotImplementedError:
            raise UserError(
                f"{self.description}: tensor {tensor.name} has type {tensor.tensor_type.name}, which the gguf package cannot dequantize"
            ) from None
        return self._hf_rows(name, data)

    def codes(self, name: str) -> Codes | None:
        """The same tensor as the file stores it, rows of q and k in Hugging Face order; None for types other than those of `_CODES`."""
        tensor = self._tensors[name]
        read = _CODES.get(tensor.tensor_type)
        if read is None or len(self.shapes[name]) != 2:
            return None
        _, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        outputs = self.shapes[name][0]
        found = read(np.asarray(tensor.data).reshape(outputs, -1, block_bytes))
        return Codes(*(None if array is None else self._hf_rows(name, array.reshape(outputs, -1)) for array in found))

    def _hf_rows(self, name: str, data: np.ndarray) -> np.ndarray:
        """Undoes what the converter did to q and k of Llama: it interleaved the halves of each head, for rotation of neighbouring pairs."""
        if self.architecture != "llama" or not (".q_proj." in name or ".k_proj." in name):
            return data
        heads = self._kv_heads if ".k_proj." in name else self._heads
        halves = data.reshape(heads, data.shape[0] // heads // 2, 2, *data.shape[1:])
        return halves.swapaxes(1, 2).reshape(data.shape)

    @property
    def _heads(self) -> int:
        return self.field(f"{self.architecture}.attention.head_count")

    @property
    def _kv_heads(self) -> int:
        return self.field(f"{self.architecture}.attention.head_count_kv", self._heads)

    def hf_config(self) -> dict[str, Any]:
        """The metadata in the form of a Hugging Face `config.json`, for `ModelConfig.from_hf`."""

        def field(name: str, default: Any = None) -> Any:
            return self.field(f"{self.architecture}.{name}", default)

        for name in _REQUIRED_FIELDS:
            if field(name) is None:
                raise UserError(f"{self.description}: no metadata field {self.architecture}.{name}")
        embed = self.shapes.get("model.embed_tokens.weight") or ()
        tokens = self.field("tokenizer.ggml.tokens")
        vocab_size = embed[0] if embed else len(tokens) if isinstance(tokens, list) else None
        rotated = field("rope.dimension_count")
        head_dim = field("attention.key_length", rotated)
        for name, value in (("rope.dimension_count", rotated), ("attention.key_length", head_dim)):
            if not isinstance(value, int | None) or (value is not None and value <= 0):
                raise UserError(
                    f"{self.description}: metadata field {self.architecture}.{name} is {value!r:.80}; expected a positive integer"
                )
        ends = [self.field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        return {
            "model_type": self.architecture,
            "vocab_size": vocab_size,
            "hidden_size": field("embedding_length"),
            "num_hidden_layers": field("block_count"),
            "num_attention_heads": self._heads,
            "num_key_value_heads": self._kv_heads,
            "head_dim": head_dim,
            "intermediate_size": field("feed_forward_length"),
            "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": field("context_length"),
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self.shapes,
            "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in self.shapes,
            "rope_theta": field("rope.freq_base"),
            "partial_rotary_factor": rotated / head_dim if rotated else None,
            "rope_scaling": self._rope_scaling(),
            "eos_token_id": [token for token in ends if isinstance(token, int) and 0 <= token < (vocab_size or 0)],
        }

    def _rope_scaling(self) -> dict[str, Any]:
        prefix = f"{self.architecture}.rope.scaling"
        factor = self.field(f"{prefix}.factor") or self.field(f"{self.architecture}.rope.scale_linear")  # the second in files of 2023
        kind = self.field(f"{prefix}.type", "linear" if factor else "none")
        # Llama 3 files carry the result of its scaling as divisors of the frequencies, not its parameters.
        if self._rope_factors is not None:
            if kind != "none" and factor not in (None, 1.0):
                raise UserError(f"{self.description}: rope scaling {kind!r} beside {_ROPE_FACTORS} is not supported; expected one of them")
            return {"rope_type": "divisors", "divisors": self._rope_factors}
        return {
            "rope_type": "default" if kind == "none" else kind,
            "factor": factor,
            "original_max_position_embeddings": self.field(f"{prefix}.original_context_length"),
            "attention_factor": self.field(f"{prefix}.yarn_attn_factor"),
            "beta_fast": self.field(f"{prefix}.yarn_beta_fast"),
            "beta_slow": self.field(f"{prefix}.yarn_beta_slow"),
        }


def _halves(blocks: np.ndarray, first: int) -> np.ndarray:
    """The float16 that stands at a byte of each block, in float32: [O, blocks] of uint8 [O, blocks, bytes]."""
    return np.ascontiguousarray(blocks[..., first : first + 2]).view(np.float16)[..., 0].astype(np.float32)


def _codes_of_q4_0(blocks: np.ndarray) -> Codes:
    scale = _halves(blocks, 0)
    return Codes(blocks[..., 2:], scale, -8 * scale)  # its codes stand for -8..7; exact, as is what comes of it


def _codes_of_q4_1(blocks: np.ndarray) -> Codes:
    return Codes(blocks[..., 4:], _halves(blocks, 0), _halves(blocks, 2))


def _codes_of_q8_0(blocks: np.ndarray) -> Codes:
    return Codes(blocks[..., 2:].view(np.int8), _halves(blocks, 0), None)


def _codes_of_q4_k(blocks: np.ndarray) -> Codes:
    """Blocks of 8 groups, which have scales and minima of 6 bits times two float16; pairs of groups share bytes."""
    low, high, mixed = (blocks[..., first : first + 4] for first in (4, 8, 12))
    scales = np.concatenate([low & 63, mixed & 15 | low >> 2 & 48], axis=-1)
    minima = np.concatenate([high & 63, mixed >> 4 | high >> 2 & 48], axis=-1)
    pairs = blocks[..., 16:].reshape(*blocks.shape[:2], 4, 1, 2, 16)  # the halves of two groups, the second one's in the high bits
    codes = np.concatenate([pairs & 15, pairs >> 4], axis=3)  # [O, blocks, 4, 2 groups, 2 halves, 16]
    packed = codes[..., 0, :] | codes[..., 1, :] << 4
    return Codes(packed, _halves(blocks, 0)[..., None] * scales, -(_halves(blocks, 2)[..., None] * minima))


# How the types are read whose numbers are `scale * code + offset` in groups of 32: from blocks, uint8 [O, blocks, bytes].
_CODES = {
    gguf.GGMLQuantizationType.Q4_0: _codes_of_q4_0,
    gguf.GGMLQuantizationType.Q4_1: _codes_of_q4_1,
    gguf.GGMLQuantizationType.Q4_K: _codes_of_q4_k,
    gguf.GGMLQuantizationType.Q8_0: _codes_of_q8_0,
}


def _aligned_empty(shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array that starts where JAX on CPU can take it over without a copy."""
    memory = np.empty(math.prod(shape) + _ALIGNMENT // 4, np.float32)
    skipped = -memory.ctypes.data % _ALIGNMENT // 4
    return memory[skipped : skipped + math.prod(shape)].reshape(shape)


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; names that are not known stay, and are reported as unexpected."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{kind}"
    match stem.split("."):
        case ["blk", layer, part] if part in _BLOCK_NAMES:
            return f"model.layers.{layer}.{_BLOCK_NAMES[part]}.{kind}"
    return name
