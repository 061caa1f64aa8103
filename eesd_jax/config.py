"""Frozen, hashable configurations: what is static under `jax.jit`, and the only place with numeric defaults.

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


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How a token is drawn. Temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch a filter off.

    Filters apply in this order, as in transformers: temperature, top-k, top-p, min-p.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature is {self.temperature}; expected a finite number >= 0 (0 is greedy)")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; expected an integer >= 0 (0 switches it off)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; expected a number in (0, 1] (1 switches it off)")
        if not 0 <= self.min_p < 1:
            raise UserError(f"min_p is {self.min_p}; expected a number in [0, 1) (0 switches it off)")


@dataclasses.dataclass(frozen=True)
class ControllerConfig:
    """Settings of the learning controllers (see `decode/controllers.py`): our own, chosen by simulation (docs/controllers.md)."""

    prior_alpha: float = 1.0
    prior_beta: float = 1.0
    discount: float = 0.9
    idle_discount: float = 0.995
    kappa: float = 8.0
    capacity: float = 40.0

    def __post_init__(self):
        for name in ("prior_alpha", "prior_beta", "capacity"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UserError(f"{name} is {value}; expected a positive number")
        for name in ("discount", "idle_discount"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UserError(f"{name} is {value}; expected a number in [0, 1] (1 forgets nothing)")
        if not 0 <= self.kappa < math.inf:
            raise UserError(f"kappa is {self.kappa}; expected a number >= 0 (0 ignores confidence)")


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """The static side of speculation: how many blocks draft, and how many tokens at most.

    Verification is compiled for a few widths (drafts + 1), so that its cost follows the drafts. Each costs compile time, and kernels work
    on several rows at once, so not every width is worth a program of its own.

    exit_layer: N; any number from 0 where there is no branch. longest_match: tokens that lookup asks a match to have in common with the
    end of the text, at most; 0 for no lookup.
    """

    exit_layer: int
    max_draft: int = 8
    verify_widths: tuple[int, ...] = (1, 2, 3, 4, 5, 9, 17)
    longest_match: int = 0

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths to compile: those below max_draft + 1, and that one."""
        return (*(width for width in self.verify_widths if width <= self.max_draft), self.max_draft + 1)


ARMS = ("exit", "lookup")  # what can draft: the exit branch, and lookup in the text so far
LONGEST_MATCH = 3
# Wherever there is anything to draft with.
DEFAULT_CONTROLLER = "cost_aware"


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Shapes and pacing of generation.

    Every program is compiled for one (batch, prompt bucket, capacity bucket), so a prompt of another length seldom compiles anything.
    """

    max_new_tokens: int = 256
    batch_size: int = 1
    seed: int = 0
    # Prompts are right-padded to one of these; longer ones are run in chunks of the last.
    prompt_buckets: tuple[int, ...] = (64, 128, 256, 512)
    # Capacities (prompt + budget, in tokens) are rounded up to this times 1, 1.5, 2, 3, 4, 6, 8, ...
    min_capacity: int = 128
    # Steps between two looks of the host: while streaming or watching for stop strings, and otherwise (so that Ctrl-C is noticed).
    stream_chunk: int = 8
    chunk: int = 64


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh (see `model/sharding.py`); -1: all that the other axes leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class SelfGenerateConfig:
    """How the model writes its own training text (`train/self_generate.py`).

    prompts: a JSONL file, `tfds:NAME` (any dataset that tfds finds), or `self`: the model writes the user's turn, too.
    num_responses: how many; 0 for one a prompt. Where there are fewer prompts, they are used again, with another seed.
    temperatures: of the sampled responses, taken in turn. greedy_share: the part of the responses that is greedy instead.
    batch_size: rows that are generated at once; a row that is finished is refilled. 0: 32 a device.
    validation_share: the part of the prompts (all their responses) that is held out.
    exit_branch, controller: to generate by EESD, once there is a branch.
    """

    prompts: str = "self"
    num_responses: int = 0
    max_prompt_tokens: int = 512
    max_new_tokens: int = 256
    temperatures: tuple[float, ...] = (0.7, 1.0)
    greedy_share: float = 0.5
    batch_size: int = 0
    validation_share: float = 0.02
    seed: int = 0
    exit_branch: str = "none"
    controller: str = "plain"


@dataclasses.dataclass(frozen=True)
class RefillConfig:
    """Shapes and pacing of generation with refilled rows (`distill/refill.py`).

    prompt_buckets: prompts are padded to one of these; longer ones to a multiple of the last. cache_buckets: how much room the caches have
    for the prompt; requests of one such bucket run together. chunk: steps between two looks at which rows are finished.
    prefill_rows: prompts that are run at once on a device; 1 on CPU, where wider passes gain nothing. rows: of a device, by default.
    """

    prompt_buckets: tuple[int, ...] = (64, 96, 128, 192, 256, 384, 512)
    cache_buckets: tuple[int, ...] = (128, 256, 512)
    chunk: int = 16
    prefill_rows: int = 4
    rows: int = 32


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a training step reads (`distill/data.py`).

    path: a folder written by self-generation, or a JSONL file of chats (`messages`); empty for OUTPUT_DIR/dataset.
    sequence_length: tokens of a training row; longer examples are cut. pack: several examples to a row, told apart by segment ids.
    validation_share: held out of a JSONL file of chats (a dataset has a split of its own).
    max_examples: use only the first so many; 0 for all.
    """

    path: str = ""
    sequence_length: int = 512
    pack: bool = True
    validation_share: float = 0.02
    max_examples: int = 0


def _check_at_least(group: str, config: Any, **least: int) -> None:
    """Raises UserError for a field of a group of the experiment that is no finite number, or below its least value."""
    for name, lowest in least.items():
        value = getattr(config, name)
        if not lowest <= value < math.inf:
            kind = "an integer" if isinstance(value, int) else "a number"
            raise UserError(f"{group}.{name} is {value}; expected {kind} >= {lowest}")


LOSSES = ("soft", "reverse_kl", "total_variation", "hard", "regression")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What the branch learns by (`distill/loss.py`).

    The fields named in `LOSSES` are the weights of those losses, 0 for without. chunk: positions whose logits exist at once.
    """

    soft: float = 1.0
    reverse_kl: float = 0.0
    total_variation: float = 0.0
    hard: float = 0.0
    regression: float = 0.0
    chunk: int = 256

    def __post_init__(self):
        for name in LOSSES:
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UserError(f"loss.{name} is {value}; expected a weight >= 0")
        if not any(getattr(self, name) for name in LOSSES):
            raise UserError(f"the weights of all losses are 0; expected a positive one among {', '.join(LOSSES)}")
        _check_at_least("loss", self, chunk=1)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) with linear warm-up and cosine decay to `final_share` of the peak.

    clip_norm: of the gradient; 0 for no clipping. accumulate: parts that a batch is taken in, one after the other.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_share: float = 0.1
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    accumulate: int = 1

    def __post_init__(self):
        _check_at_least("optimizer", self, learning_rate=0, warmup_steps=0, weight_decay=0, clip_norm=0, accumulate=1)
        for name, most in (("beta1", "below 1"), ("beta2", "below 1"), ("final_share", "to 1")):
            value = getattr(self, name)
            if not (0 <= value < 1 or (value == 1 and most == "to 1")):
                raise UserError(f"optimizer.{name} is {value}; expected a number from 0 {most}")


@dataclasses.dataclass(frozen=True)
class BranchConfig:
    """The exit branch that is trained.

    draft_vocab: tokens that it can draft, the most frequent ones of the training responses; 0 for all. train_head: whether its LM head is
    trained, or stays the target's. save_dtype: in which the result is written.
    """

    exit_layer: int = 0
    start: str = "next"
    draft_vocab: int = 0
    train_head: bool = False
    save_dtype: str = "float32"

    def __post_init__(self):
        if self.save_dtype not in ("float32", "float16", "bfloat16"):
            raise UserError(f"branch.save_dtype is {self.save_dtype!r}; expected float32, float16 or bfloat16")


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Cached mode: one pass of the trunk over all rows is written to disk, and every epoch reads it (`distill/teacher.py`).

    top_tokens: how many of the teacher's most probable tokens are kept at each position. dtype: of what is kept, float16 or float32.
    path: the folder; empty for OUTPUT_DIR/cache.
    """

    enabled: bool = False
    top_tokens: int = 16
    dtype: str = "float16"
    path: str = ""

    def __post_init__(self):
        if self.dtype not in ("float16", "float32"):
            raise UserError(f"cache.dtype is {self.dtype!r}; expected float16 or float32")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is looked at every `every` steps and at the end: held-out loss, and rollouts of the real decoder on held-out prompts.

    every: 0 for at the end only. batches: of held-out rows. rollouts: prompts; 0 for none. rollout_tokens: of each text.
    rollout_draft: tokens drafted in a round.
    """

    every: int = 500
    batches: int = 8
    rollouts: int = 8
    rollout_tokens: int = 64
    rollout_draft: int = 4

    def __post_init__(self):
        _check_at_least("evaluation", self, every=0, batches=0, rollouts=0, rollout_tokens=1, rollout_draft=1)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """every: steps between checkpoints. keep: how many stay."""

    every: int = 500
    keep: int = 2

    def __post_init__(self):
        _check_at_least("checkpoint", self, every=1, keep=1)


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """One experiment: a file in `configs/` (see `eesd_jax/experiment.py`).

    model: as for --model. dtype: of the trunk; empty for float32 on CPU and bfloat16 elsewhere. The branch is trained in float32.
    batch_size: rows of a step, over all devices and accumulated parts.
    """

    model: str = "demo"
    output_dir: str = ""
    seed: int = 0
    dtype: str = ""
    steps: int = 1000
    batch_size: int = 8
    mesh: MeshConfig = MeshConfig()
    self_generate: SelfGenerateConfig = SelfGenerateConfig()
    data: DataConfig = DataConfig()
    branch: BranchConfig = BranchConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    cache: CacheConfig = CacheConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
