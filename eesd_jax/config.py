"""Settings: frozen and hashable, so that they can be static under `jax.jit`, and the only place with their numeric defaults.

The shape of a model is in `model/config.py`.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

from eesd_jax.errors import UserError, integer, shown


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
        self._check("temperature", "a finite number >= 0 (0 is greedy)", lambda value: math.isfinite(value) and value >= 0)
        integer(self.top_k, "top_k", "an integer >= 0 (0 switches it off)", least=0)
        self._check("top_p", "a number in (0, 1] (1 switches it off)", lambda value: 0 < value <= 1)
        self._check("min_p", "a number in [0, 1) (0 switches it off)", lambda value: 0 <= value < 1)

    def _check(self, name: str, expected: str, allowed: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not allowed(value):
            raise UserError(f"{name} is {shown(value) if isinstance(value, str) else value}; expected {expected}")


@dataclasses.dataclass(frozen=True)
class ControllerConfig:
    """Settings of the learning controllers (see `decode/controllers/`): our own, chosen by simulation (docs/controllers.md)."""

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
    end of the text, at most; 0 for no lookup. candidates: of the branch for each token of a draft; the first one is drafted on from, and
    the others are checked in the same pass, in case that it is rejected.
    """

    exit_layer: int
    max_draft: int = 8
    verify_widths: tuple[int, ...] = (1, 2, 3, 4, 5, 9, 17)
    longest_match: int = 0
    candidates: int = 1

    def __post_init__(self):
        for name in ("max_draft", "candidates"):
            integer(getattr(self, name), name, "an integer >= 1", least=1)

    @property
    def others(self) -> int:
        """Candidates beside the first one."""
        return self.candidates - 1

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths to compile: those below max_draft + 1, and that one."""
        return (*(width for width in self.verify_widths if width <= self.max_draft), self.max_draft + 1)

    def width_of(self, drafts: int) -> int:
        """The narrowest of them, in tokens, that holds so many drafts and the token before them."""
        return next(width for width in self.widths if width > drafts)


NOT_QUANTIZED = "none"
QUANTIZATIONS = (NOT_QUANTIZED, "int8", "int4")  # of the target's weights; see `model/stored.py`


def check_quantize(value: str, what: str = "quantize") -> None:
    """Raises UserError for a quantisation that there is not; `what` is the name of the setting."""
    if value not in QUANTIZATIONS:
        raise UserError(f"{what} is {value!r}; expected one of {', '.join(QUANTIZATIONS)}")


ARMS = ("exit", "lookup")  # what can draft: the exit branch, and lookup in the text so far


def parse_arms(names: str | Sequence[str]) -> tuple[str, ...]:
    """Checks the sources of drafts, and puts them in order; a text names one, or several with commas between them.

    Raises:
      UserError: none, or one that there is not.
    """
    if isinstance(names, str):
        names = [name.strip() for name in names.split(",")]
    if not isinstance(names, list | tuple | set) or not names or any(name not in ARMS for name in names):
        given = ",".join(map(str, names)) if isinstance(names, list | tuple | set) else names
        raise UserError(f"arms are {given!r}; expected one or more of {', '.join(ARMS)}")
    return tuple(arm for arm in ARMS if arm in names)


PROMPT_BUCKETS = (64, 96, 128, 192, 256, 384, 512)
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
    prompt_buckets: tuple[int, ...] = PROMPT_BUCKETS
    # Capacities (prompt + budget, in tokens) are rounded up to this times 1, 1.5, 2, 3, 4, 6, 8, ...
    min_capacity: int = 128
    # Steps between two looks of the host: while streaming or watching for stop strings, and otherwise (so that Ctrl-C is noticed).
    stream_chunk: int = 8
    chunk: int = 64

    def __post_init__(self):
        integer(self.seed, "seed")
        for name in ("max_new_tokens", "batch_size", "min_capacity", "stream_chunk", "chunk"):
            integer(getattr(self, name), name, "an integer >= 1", least=1)
        expected, given = "integers >= 1 that grow, as in (64, 128)", self.prompt_buckets
        if not isinstance(given, list | tuple):
            raise UserError(f"prompt_buckets is {shown(given)}; expected {expected}")
        sizes = tuple(integer(size, f"prompt_buckets is {shown(given)}: one", expected, least=1) for size in given)
        if not sizes or list(sizes) != sorted(set(sizes)):
            raise UserError(f"prompt_buckets is {shown(given)}; expected {expected}")
        object.__setattr__(self, "prompt_buckets", sizes)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh (see `model/sharding.py`); -1: all that the other axes leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class ProcessesConfig:
    """Patience with the other processes of a run, in seconds (`cluster/processes.py`).

    join: until all have come. exchange: for what each says of itself. shared: for a file of process 0 to be seen by all.
    """

    join: float = 300.0
    exchange: float = 600.0
    shared: float = 10.0


@dataclasses.dataclass(frozen=True)
class LifelineConfig:
    """Patience with processes that end, in seconds (`cluster/lifeline.py`).

    connect: for a connection. grace: to say the same mistake oneself. keepalive: silence of a machine before it is asked, seconds between
    questions, and how many may stay without an answer.
    """

    connect: float = 20.0
    grace: float = 3.0
    keepalive: tuple[int, int, int] = (15, 5, 6)


@dataclasses.dataclass(frozen=True)
class SelfGenerateConfig:
    """How the model writes its own training text (`train/self_generate.py`).

    prompts: a JSONL file, `tfds:NAME` (any dataset that tfds finds), or `self`: the model writes the user's turn, too.
    num_responses: how many; 0 for one a prompt. Where there are fewer prompts, they are used again, with another seed.
    temperatures: of the sampled responses, taken in turn. greedy_share: the part of the responses that is greedy instead.
    batch_size: rows that are generated at once; a row that is finished is refilled. 0: 32 a device.
    validation_share: the part of the prompts (all their responses) that is held out.
    exit_branch, controller: to generate by EESD, once there is a branch.
    features: whether what training reads of the target is kept as it writes, for this `branch.exit_layer`, `cache.top_tokens` and
    `cache.dtype`: then a cache needs no pass of its own. For plain decoding, and a local disk.
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
    features: bool = False


@dataclasses.dataclass(frozen=True)
class RefillConfig:
    """Shapes and pacing of generation with refilled rows (`engine/scheduler.py`).

    prompt_buckets: prompts are padded to one of these; longer ones to a multiple of the last. cache_buckets: how much room the caches have
    for the prompt; requests of one such bucket run together. chunk: steps between two looks at which rows are finished.
    prefill_rows: prompts that are run at once on a device; 1 on CPU, where wider passes gain nothing. rows: of a device, by default.
    """

    prompt_buckets: tuple[int, ...] = PROMPT_BUCKETS
    cache_buckets: tuple[int, ...] = (128, 256, 512)
    chunk: int = 16
    prefill_rows: int = 4
    rows: int = 32


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a training step reads (`distill/data.py`).

    path: a folder written by self-generation, or a JSONL file of chats (`messages`), or several of them with commas between; empty for
    OUTPUT_DIR/dataset.
    sequence_length: tokens of a training row; longer examples are cut. pack: several examples to a row, told apart by segment ids.
    validation_share: held out of a JSONL file of chats (a dataset has a split of its own).
    max_examples: use only the first so many of each; 0 for all.
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

    The fields named in `LOSSES` are the weights of those losses, 0 for without. passes: of a branch with the deep input, over the same
    text: the first reads what the target gives out, and each further one what the pass before gave out, as the second, third, ... draft of
    a round does. chunk: positions whose logits exist at once.
    """

    soft: float = 1.0
    reverse_kl: float = 0.0
    total_variation: float = 0.0
    hard: float = 0.0
    regression: float = 0.0
    passes: int = 1
    chunk: int = 256

    def __post_init__(self):
        for name in LOSSES:
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UserError(f"loss.{name} is {value}; expected a weight >= 0")
        if not any(getattr(self, name) for name in LOSSES):
            raise UserError(f"the weights of all losses are 0; expected a positive one among {', '.join(LOSSES)}")
        _check_at_least("loss", self, passes=1, chunk=1)


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

    exit_layer: N; 0 only with deep_input. start: see `init_exit_branch`. deep_input: whether it also reads the target's last hidden state
    of the token before. draft_vocab: tokens that it can draft, the most frequent ones of the training responses; 0 for all. train_head:
    whether its LM head is trained, or stays the target's. save_dtype: in which the result is written; int8 is of matrices, and read as such
    on CPUs. init_from: a branch to go on from instead of `start`, as for --exit_branch: a folder, a hub id, or `demo`; its draft vocabulary
    stays, and it may have stood behind another block.
    """

    exit_layer: int = 0
    start: str = "next"
    deep_input: bool = False
    draft_vocab: int = 0
    train_head: bool = False
    save_dtype: str = "float32"
    init_from: str = ""

    def __post_init__(self):
        if self.save_dtype not in ("float32", "float16", "bfloat16", "int8"):
            raise UserError(f"branch.save_dtype is {self.save_dtype!r}; expected float32, float16, bfloat16 or int8")


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
    """One experiment: a file in `configs/` (see `eesd_jax/distill/experiment.py`).

    model: as for --model. dtype: of the trunk; empty for float32 on CPU and bfloat16 elsewhere. The branch is trained in float32.
    quantize: of the trunk's matrices: none, int8 or int4; text is then written, and the branch made, for the quantised target.
    batch_size: rows of a step, over all devices and accumulated parts.
    """

    model: str = "demo"
    output_dir: str = ""
    seed: int = 0
    dtype: str = ""
    quantize: str = NOT_QUANTIZED
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

    def __post_init__(self):
        check_quantize(self.quantize)
