"""The shape of a model: frozen and hashable, so that it can be static under `jax.jit`.

Comes with `import eesd_jax`, before a command checks its flags, so it imports nothing slow.

`ModelConfig.from_hf` reads a Hugging Face `config.json` (transformers 4 and 5 spellings). GGUF metadata is first brought into the same form
(see `weights/gguf.py`), so there is one reading of every architecture.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from eesd_jax.errors import UserError

# What each supported `model_type` adds to the plain Llama block.
SUPPORTED_ARCHITECTURES = {
    "llama": "Llama 1/2/3.x, Vicuna, CodeLlama, TinyLlama, SmolLM2",
    "mistral": "Mistral (sliding window)",
    "qwen2": "Qwen2, Qwen2.5 (q/k/v bias)",
    "qwen3": "Qwen3 (q/k norm)",
}
SUPPORTED_ROPE = ("default", "linear", "llama3", "yarn")  # and "divisors", which only GGUF files have
# What a `config.json` that leaves a field out means by that, where it is not the same for every architecture (as in transformers).
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {
        "max_position_embeddings": 32_768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "head_dim": 128,
    },
}
_LARGEST = 2**31 - 1  # sizes and positions are counted in int32
_MOST_LAYERS, _MOST_CHANNELS = 10_000, 2**16  # of which something is made before any weight is looked at


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding and its length extension.

    `factor` and the fields after it are read by the kinds that use them: `linear` (Chen et al. 2023), `llama3` (Llama 3.1 release), `yarn`
    (Peng et al. 2023).
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    divisors: tuple[float, ...] = ()  # one a channel pair, when kind is "divisors"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The static shape of a target model.

    Sizes are counts. `context_length` is what the model can be used with, its extension included. `windows` has one entry a block (None:
    attends to everything before it).
    """

    architecture: str
    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    rope: RopeConfig
    context_length: int
    tie_embeddings: bool
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def from_hf(cls, hf: dict[str, Any], source: str) -> "ModelConfig":
        """Reads the contents of a Hugging Face `config.json`.

        Args:
          hf: the parsed JSON object.
          source: where it came from, for error messages.

        Raises:
          UserError: an architecture, rope kind or activation that is not supported, or a field missing or contradictory.
        """
        kind = hf.get("model_type")
        if not isinstance(kind, str) or kind not in SUPPORTED_ARCHITECTURES:
            supported = "; ".join(f"{name}: {what}" for name, what in SUPPORTED_ARCHITECTURES.items())
            raise UserError(f"{source}: architecture {kind!r} is not supported; supported are {supported}")
        if quantization := hf.get("quantization_config"):
            raise UserError(f"{source}: quantization_config {quantization} is not supported; expected plain weights, or a GGUF file")
        fields = _Fields(_HF_DEFAULTS[kind] | hf, source)
        activation = fields.get("hidden_act") or "silu"
        if activation not in ("silu", "swish"):
            raise UserError(f"{source}: hidden_act {activation!r} is not supported; expected 'silu'")
        sizes = _heads(fields)
        num_layers = fields.size("num_hidden_layers", most=_MOST_LAYERS)
        rope, context_length = _rope_from_hf(fields, sizes["head_dim"])
        attention_bias = fields.flag("attention_bias") and kind in ("llama", "qwen3")
        return cls(
            architecture=kind,
            vocab_size=fields.size("vocab_size"),
            num_layers=num_layers,
            **sizes,
            intermediate_size=fields.size("intermediate_size"),
            norm_eps=fields.positive("rms_norm_eps", 1e-6),
            rope=rope,
            context_length=context_length,
            tie_embeddings=fields.flag("tie_word_embeddings"),
            windows=_windows_from_hf(fields, kind, num_layers),
            qkv_bias=attention_bias or kind == "qwen2",
            out_bias=attention_bias,
            mlp_bias=fields.flag("mlp_bias") and kind == "llama",
            qk_norm=kind == "qwen3",
        )


class _Fields:
    """Fields of a `config.json`, each checked as it is read; null is a field left out.

    Raises:
      UserError: from every method, naming the field, its value, and what was expected.
    """

    def __init__(self, values: dict[str, Any], source: str):
        self._values, self.source = values, source

    def get(self, name: str) -> Any:
        return self._values.get(name)

    def size(self, name: str, default: int | None = None, most: int = _LARGEST) -> int:
        value = self.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise UserError(f"{self.source}: {name} is {value!r}; expected a positive integer")
        if value > most:
            raise UserError(f"{self.source}: {name} is {value}; expected {most} at most")
        return value

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if not isinstance(value, bool | None):  # the text "false" would be true
            raise UserError(f"{self.source}: {name} is {value!r}; expected true or false")
        return bool(value)

    def positive(self, name: str, default: float | None) -> float | None:
        value = self.get(name)
        value = default if value is None else value
        return None if value is None else _positive(value, name, self.source)


def _heads(fields: _Fields) -> dict[str, int]:
    hidden_size, num_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    num_kv_heads, source = fields.size("num_key_value_heads", default=num_heads), fields.source
    if num_heads % num_kv_heads:
        raise UserError(f"{source}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
    if not fields.get("head_dim") and hidden_size % num_heads:
        raise UserError(
            f"{source}: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}, and there is no head_dim"
        )
    head_dim = fields.size("head_dim", default=hidden_size // num_heads, most=_MOST_CHANNELS)
    if head_dim % 2:
        raise UserError(f"{source}: head_dim is {head_dim}; rotary embeddings need an even number")
    return {"hidden_size": hidden_size, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}


def _positive(value: Any, name: str, source: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"{source}: {name} is {value!r}; expected a positive number")
    return float(value)


def _rope_from_hf(fields: _Fields, head_dim: int) -> tuple[RopeConfig, int]:
    """The rotary embedding, and the context that it makes possible."""
    source, stated = fields.source, fields.size("max_position_embeddings")
    scaling = _rope_fields(fields)

    def number(name: str, default: float | None) -> float | None:
        value = scaling.get(name) or fields.get(name)  # null and 0 leave it to the default, as in transformers
        return _positive(value, name, source) if value else default

    partial = number("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise UserError(f"{source}: partial_rotary_factor is {partial}; only 1.0 is supported")
    theta = number("rope_theta", RopeConfig.theta)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "divisors":
        return RopeConfig(theta=theta, kind=kind, divisors=_divisors(scaling, head_dim, source)), stated
    if kind not in SUPPORTED_ROPE:
        raise UserError(f"{source}: rope scaling {kind!r} is not supported; supported are {', '.join(SUPPORTED_ROPE)}")
    if kind == "default":
        return RopeConfig(theta=theta), stated
    original = number("original_max_position_embeddings", None)
    factor = number("factor", stated / original if kind == "yarn" and original else None)
    if factor is None:
        raise UserError(f"{source}: rope scaling {kind!r} has no 'factor'")
    rope = RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        original_context=int(original or stated),
        low_freq_factor=number("low_freq_factor", RopeConfig.low_freq_factor),
        high_freq_factor=number("high_freq_factor", RopeConfig.high_freq_factor),
        beta_fast=number("beta_fast", RopeConfig.beta_fast),
        beta_slow=number("beta_slow", RopeConfig.beta_slow),
        attention_factor=number("attention_factor", _yarn_attention_factor(number, factor)) if kind == "yarn" else 1.0,
        truncate=scaling.get("truncate") is not False,
    )
    _check_rope(rope, source)
    if kind in ("linear", "yarn") and not original and fields.get("max_sequence_length") is not None:
        return rope, max(stated, fields.size("max_sequence_length"))  # FastChat's word for the product
    return rope, _extended_context(rope, stated, source)


def _rope_fields(fields: _Fields) -> dict[str, Any]:
    """What a config says of rotary embeddings: `rope_scaling` of transformers 4 beside or over the `rope_parameters` of transformers 5."""
    found: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        value = fields.get(name)
        if value is not None and not isinstance(value, dict):
            raise UserError(
                f'{fields.source}: {name} is {value!r}; expected an object such as {{"rope_type": "linear", "factor": 2.0}}, or null'
            )
        value = value or {}
        if per_type := [key for key, inner in value.items() if isinstance(inner, dict)]:
            raise UserError(f"{fields.source}: rope parameters for each layer type ({', '.join(per_type)}) are not supported")
        if "type" in value or "rope_type" in value:  # which then stands for both spellings of the other one
            found = {key: inner for key, inner in found.items() if key not in ("type", "rope_type")}
        found |= {key: inner for key, inner in value.items() if inner is not None}
    return found


def _divisors(scaling: dict[str, Any], head_dim: int, source: str) -> tuple[float, ...]:
    divisors = scaling.get("divisors")
    if not isinstance(divisors, (list, tuple)) or len(divisors) != head_dim // 2:
        count = len(divisors) if isinstance(divisors, (list, tuple)) else "no"
        raise UserError(f"{source}: {count} rope frequency divisors; expected {head_dim // 2}, half of head_dim")
    return tuple(_positive(divisor, "a rope frequency divisor", source) for divisor in divisors)


def _check_rope(rope: RopeConfig, source: str) -> None:
    """Raises UserError where the frequencies would come of a division by zero."""
    if rope.original_context < 1:
        raise UserError(f"{source}: original_max_position_embeddings is below 1; expected a number of positions")
    if rope.kind == "yarn" and rope.theta <= 1:
        raise UserError(f"{source}: rope_theta is {rope.theta}; expected more than 1 for rope scaling 'yarn'")
    if rope.kind == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        raise UserError(
            f"{source}: high_freq_factor is {rope.high_freq_factor}; expected more than low_freq_factor, {rope.low_freq_factor}"
        )


def _extended_context(rope: RopeConfig, stated: int, source: str) -> int:
    """How many positions a model is good for, where its config scales rotary embeddings.

    With `linear` and `yarn`, `max_position_embeddings` is in some files what the model was first trained with (Qwen2.5, Vicuna-16k: their
    model cards and vLLM multiply it), in others the product already: `original_max_position_embeddings` tells. Files of `llama3` state the
    product.
    """
    if rope.kind not in ("linear", "yarn"):
        return stated
    extended = rope.original_context * rope.factor
    if extended > _LARGEST:
        raise UserError(f"{source}: rope scaling by {rope.factor:g} makes a context of {extended:.3g} tokens; expected {_LARGEST} at most")
    return max(stated, round(extended))


def _yarn_attention_factor(number: Callable[[str, float | None], float | None], factor: float) -> float:
    """The scale of cos and sin, where the config does not give it: 0.1 ln(factor) + 1 (YaRN, equation 22), or a ratio of two such."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, mscale_all_dim = number("mscale", None), number("mscale_all_dim", None)
    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


def _windows_from_hf(fields: _Fields, kind: str, num_layers: int) -> tuple[int | None, ...]:
    is_qwen, source = kind.startswith("qwen"), fields.source
    if kind == "llama" or fields.get("sliding_window") is None or (is_qwen and not fields.flag("use_sliding_window")):
        return (None,) * num_layers
    window = fields.size("sliding_window")
    if layer_types := fields.get("layer_types"):
        if not isinstance(layer_types, list) or len(layer_types) != num_layers:
            found = f"{len(layer_types)} entries" if isinstance(layer_types, list) else repr(layer_types)
            raise UserError(f"{source}: layer_types has {found} for {num_layers} layers")
        if other := [name for name in layer_types if name not in ("sliding_attention", "full_attention")]:
            raise UserError(f"{source}: layer_types has {other[0]!r}; expected 'sliding_attention' or 'full_attention'")
        return tuple(window if name == "sliding_attention" else None for name in layer_types)
    first_windowed = fields.get("max_window_layers") if is_qwen else 0
    if not isinstance(first_windowed, int):
        raise UserError(f"{source}: max_window_layers is {first_windowed!r}; expected a number of layers")
    return tuple(window if layer >= first_windowed else None for layer in range(num_layers))
