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
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
}


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
    """The static shape of a target model. Sizes are counts; `windows` has one entry a block (None: attends to everything before it)."""

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
        if kind not in SUPPORTED_ARCHITECTURES:
            supported = "; ".join(f"{name}: {what}" for name, what in SUPPORTED_ARCHITECTURES.items())
            raise UserError(f"{source}: architecture {kind!r} is not supported; supported are {supported}")
        if quantization := hf.get("quantization_config"):
            raise UserError(f"{source}: quantization_config {quantization} is not supported; expected plain weights, or a GGUF file")
        hf = _HF_DEFAULTS[kind] | hf
        activation = hf.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise UserError(f"{source}: hidden_act {activation!r} is not supported; expected 'silu'")

        def size(name: str, default: int | None = None) -> int:
            value = hf.get(name)
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise UserError(f"{source}: {name} is {value!r}; expected a positive integer")
            return value

        hidden_size, num_heads = size("hidden_size"), size("num_attention_heads")
        num_layers, num_kv_heads = size("num_hidden_layers"), size("num_key_value_heads", default=num_heads)
        if num_heads % num_kv_heads:
            raise UserError(f"{source}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
        if not hf.get("head_dim") and hidden_size % num_heads:
            raise UserError(
                f"{source}: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}, and there is no head_dim"
            )
        head_dim = size("head_dim", default=hidden_size // num_heads)
        if head_dim % 2:
            raise UserError(f"{source}: head_dim is {head_dim}; rotary embeddings need an even number")
        context_length = size("max_position_embeddings")
        attention_bias = bool(hf.get("attention_bias", False)) and kind in ("llama", "qwen3")
        return cls(
            architecture=kind,
            vocab_size=size("vocab_size"),
            num_layers=num_layers,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=size("intermediate_size"),
            norm_eps=_positive(hf.get("rms_norm_eps", 1e-6), "rms_norm_eps", source),
            rope=_rope_from_hf(hf, context_length, head_dim, source),
            context_length=context_length,
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
            windows=_windows_from_hf(hf, kind, num_layers, source),
            qkv_bias=attention_bias or kind == "qwen2",
            out_bias=attention_bias,
            mlp_bias=bool(hf.get("mlp_bias", False)) and kind == "llama",
            qk_norm=kind == "qwen3",
        )


def _positive(value: Any, name: str, source: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"{source}: {name} is {value!r}; expected a positive number")
    return float(value)


def _rope_from_hf(hf: dict[str, Any], context_length: int, head_dim: int, source: str) -> RopeConfig:
    # transformers 5 writes rope_parameters (theta included); 4 wrote rope_theta and rope_scaling.
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if per_type := [name for name, value in scaling.items() if isinstance(value, dict)]:
        raise UserError(f"{source}: rope parameters for each layer type ({', '.join(per_type)}) are not supported")

    def number(name: str, default: float | None) -> float | None:
        value = scaling.get(name) or hf.get(name)  # null and 0 leave it to the default, as in transformers
        return _positive(value, name, source) if value else default

    partial = number("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise UserError(f"{source}: partial_rotary_factor is {partial}; only 1.0 is supported")
    theta = number("rope_theta", RopeConfig.theta)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "divisors":
        divisors = tuple(scaling["divisors"])
        if len(divisors) != head_dim // 2:
            raise UserError(f"{source}: {len(divisors)} rope frequency divisors; expected {head_dim // 2}, half of head_dim")
        return RopeConfig(theta=theta, kind=kind, divisors=divisors)
    if kind not in SUPPORTED_ROPE:
        raise UserError(f"{source}: rope scaling {kind!r} is not supported; supported are {', '.join(SUPPORTED_ROPE)}")
    if kind == "default":
        return RopeConfig(theta=theta)
    original = number("original_max_position_embeddings", None)
    factor = number("factor", context_length / original if kind == "yarn" and original else None)
    if factor is None:
        raise UserError(f"{source}: rope scaling {kind!r} has no 'factor'")
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        original_context=int(original or context_length),
        low_freq_factor=number("low_freq_factor", RopeConfig.low_freq_factor),
        high_freq_factor=number("high_freq_factor", RopeConfig.high_freq_factor),
        beta_fast=number("beta_fast", RopeConfig.beta_fast),
        beta_slow=number("beta_slow", RopeConfig.beta_slow),
        attention_factor=number("attention_factor", _yarn_attention_factor(number, factor)) if kind == "yarn" else 1.0,
        truncate=bool(scaling.get("truncate", True)),
    )


def _yarn_attention_factor(number: Callable[[str, float | None], float | None], factor: float) -> float:
    """The scale of cos and sin, where the config does not give it: 0.1 ln(factor) + 1 (YaRN, equation 22), or a ratio of two such."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, mscale_all_dim = number("mscale", None), number("mscale_all_dim", None)
    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


def _windows_from_hf(hf: dict[str, Any], kind: str, num_layers: int, source: str) -> tuple[int | None, ...]:
    window = hf.get("sliding_window")
    is_qwen = kind.startswith("qwen")
    if kind == "llama" or window is None or (is_qwen and not hf.get("use_sliding_window", False)):
        return (None,) * num_layers
    window = int(_positive(window, "sliding_window", source))
    if layer_types := hf.get("layer_types"):
        if len(layer_types) != num_layers:
            raise UserError(f"{source}: layer_types has {len(layer_types)} entries for {num_layers} layers")
        return tuple(window if name == "sliding_attention" else None for name in layer_types)
    first_windowed = hf["max_window_layers"] if is_qwen else 0
    return tuple(window if layer >= first_windowed else None for layer in range(num_layers))
