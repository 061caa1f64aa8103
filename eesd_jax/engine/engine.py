"""Text in, text out: the library's front door. Tokenizes, pads to buckets, runs the jitted programs of `decode/loop.py`, and reads results.

lm = eesd_jax.load("demo")
print(lm.generate("Why is the sky blue?").text)
for piece in lm.stream("Tell me a story."): print(piece, end="", flush=True)
"""

import dataclasses
import errno
import functools
import hashlib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eesd_jax.config import (
    ARMS,
    DEFAULT_CONTROLLER,
    LONGEST_MATCH,
    NOT_QUANTIZED,
    DecodeConfig,
    DraftConfig,
    SamplingConfig,
    check_quantize,
    parse_arms,
)
from eesd_jax.decode import loop
from eesd_jax.decode import round as speculative
from eesd_jax.decode.controllers import AUTO, PLAIN, Calibration, Controller, parse_controller
from eesd_jax.decode.draft import Speculation
from eesd_jax.decode.sampling import Sampling
from eesd_jax.decode.sources.bandit import Arms
from eesd_jax.decode.state import EOS, LENGTH, RUNNING, STOPPED, DecodeState
from eesd_jax.engine import checks, timing
from eesd_jax.engine.drafter import Drafter, read_drafter
from eesd_jax.engine.encoding import Encoder
from eesd_jax.engine.generation import Generation, Rounds
from eesd_jax.engine.prefill import Prefilled, bucket_shapes, one_by_one, padded_length, worth_one_by_one
from eesd_jax.engine.streaming import TextStream
from eesd_jax.errors import UserError, integer, shown
from eesd_jax.model import llama, ops, sharding, stored
from eesd_jax.model.config import ModelConfig
from eesd_jax.model.exit_branch import with_codes
from eesd_jax.weights import branch_folder, hub, ngram_file
from eesd_jax.weights.load import LoadedModel, load_model

Messages = Sequence[dict[str, str]]
Prompt = str | Messages

_FINISH_REASONS = {EOS: "eos", LENGTH: "length", STOPPED: "stop"}

_prefill = jax.jit(loop.prefill, static_argnames=("config", "exit_layer", "capacity", "chunk"))
# Jitted so that what it adds lies where the rest of the state does: a program compiles again for arrays that are placed otherwise.
_start_drafting = jax.jit(speculative.start_drafting, static_argnames=("draft",))
_row_keys = jax.jit(jax.vmap(jax.random.key))


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def _decode_plain(
    config: ModelConfig, eos_ids: jax.Array, params: llama.Params, sampling: Sampling, state: DecodeState, max_steps: jax.Array
) -> DecodeState:
    return loop.decode(functools.partial(loop.plain_step, config, eos_ids, params, sampling), state, max_steps)


@functools.partial(jax.jit, donate_argnames=("state",))
def _decode_speculative(spec: Speculation, state: DecodeState, max_steps: jax.Array) -> DecodeState:
    state = loop.decode(functools.partial(speculative.round_step, spec), state, max_steps)
    return state._replace(draft=state.draft._replace(probs=sharding.keep_rows_whole(state.draft.probs)))


@dataclasses.dataclass
class _Row:
    """Host side of one running row: its text, and when it ended."""

    text: TextStream
    prompt_tokens: int
    finish: int = RUNNING
    seconds: float = 0.0


def load(
    model: str | os.PathLike[str] = hub.DEMO_NAME,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    decode_config: DecodeConfig = DecodeConfig(),
    exit_branch: str | os.PathLike[str] | None = "auto",
    max_draft: int = DraftConfig.max_draft,
    candidates: int = DraftConfig.candidates,
    arms: str | Sequence[str] = ARMS,
    ngrams: str | os.PathLike[str] | None = "auto",
    quantize: str = NOT_QUANTIZED,
) -> "Engine":
    """Loads a model and its exit branch, ready to generate.

    Args:
      model: `demo` (built in), a Hugging Face folder, a GGUF file, or a hub id.
      dtype: "float32" or "bfloat16"; by default float32 on CPU and bfloat16 elsewhere.
      mesh: a `data` x `fsdp` x `tensor` mesh to place the weights on; by default one device.
      decode_config: defaults of generation and its buckets.
      exit_branch: a folder, a hub id, or the name of a model for which this package carries one; `none` (or None); or `auto`: the branch
        that this package carries for `model`, and none for models for which it carries none (which is warned of). Where lookup drafts and
        weights are multiplied as the codes of their file, on a CPU, `auto` leaves the branch to the controllers that cannot do without it:
        rounds wait for arithmetic there, and what the branch adds to lookup is less than what it costs.
      max_draft: the most tokens that a round may draft, at least 1.
      candidates: of the branch for each of them, at least 1; all but the first are there in case that it is rejected. They make a round
        dearer, so this pays where a pass over more tokens costs little more, as on a GPU.
      arms: what drafts: `exit`, the branch, and `lookup` in the text so far, which needs none; a text names one, or several as in
        "exit,lookup".
      ngrams: the file of n-grams that lookup goes on with where the text has nothing (train/ngrams.py); `none` (or None); or `auto`: the
        one that this package carries for the model, if there is one.
      quantize: int8 or int4: the matrices of the target in so many bits (`model/stored.py`). That is another model: what is generated,
        speculatively or not, is the quantised model's text. `none`: as in the file.

    Raises:
      UserError: the model or the branch cannot be found or used, or an argument is of no use; the message says why.
    """
    use_compilation_cache()
    check_quantize(quantize)
    checks.check_mesh(mesh)
    if not isinstance(decode_config, DecodeConfig):
        raise UserError(f"decode_config is {shown(decode_config)}; expected a DecodeConfig, as in DecodeConfig(max_new_tokens=64)")
    dtype = checks.dtype_name(dtype)
    model = checks.name_or_path(model, "model")
    exit_branch, ngrams = (
        checks.name_or_path("none" if name is None else name, what) for name, what in ((exit_branch, "exit_branch"), (ngrams, "ngrams"))
    )
    arms = parse_arms(arms)
    longest_match = LONGEST_MATCH if "lookup" in arms else 0
    draft = DraftConfig(0, max_draft, longest_match=longest_match, candidates=candidates)
    if "exit" not in arms:
        exit_branch = "none"
    # Before the model, which can take minutes.
    folder = None
    if exit_branch == "auto":
        shipped = branch_folder.shipped_branch(model)
        folder = branch_folder.BranchFolder(shipped) if shipped else None
    elif exit_branch != "none":
        folder = branch_folder.BranchFolder(branch_folder.find_branch(exit_branch))
    if folder is None and candidates > 1:
        raise UserError(f"candidates is {candidates}, and there is no exit branch to draw them; expected 1")
    table = None
    if longest_match and ngrams != "none" and (file := ngram_file.shipped_ngrams(model) if ngrams == "auto" else ngrams):
        table = ngram_file.load_ngrams(file)
    target = load_model(model, jnp.dtype(dtype), mesh, quantize)
    if table is not None:
        ngram_file.check_ngrams(table, target.config.vocab_size)
    from_lookup_alone = exit_branch == "auto" and longest_match > 0 and candidates == 1 and stored.has_codes(target.params)
    read = None if folder is None else lambda: read_drafter(folder, target, mesh, draft)._replace(ngrams=table and table.entries)
    if read is not None and not from_lookup_alone:
        return Engine(target, decode_config, read())
    alone = Drafter(None, draft, Calibration(), trained=False, ngrams=table and table.entries) if longest_match else None
    if exit_branch == "auto" and folder is None:
        what = "drafts come from lookup alone" if longest_match else "decoding will be plain"
        warnings.warn(f"no exit branch comes with model {model!r}: {what}", stacklevel=2)
    return Engine(target, decode_config, alone, read)


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache, so that a second start is quick; a folder that the user configured is left alone.

    A cache that cannot be written to is warned of once; JAX would warn of every program.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    folder = hub.cache_dir() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        warnings.warn(
            f"cache folder {str(folder)!r} cannot be written to ({error.strerror}), and programs will be compiled at every start; "
            "EESD_JAX_CACHE names another",
            stacklevel=2,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


class Engine:
    """A loaded model that generates text.

    Attributes:
      model: the target.
      decode_config: defaults of generation and its buckets.
      drafter: what drafts, or None (then only plain decoding is to be had).
      params, branch, ngrams: the weights and the table as programs take them; weights are `Stored` where kernels read their codes.

    Args:
      spare: reads a drafter with a branch, for the controllers that need one where `drafter` has none.
    """

    def __init__(
        self,
        model: LoadedModel,
        decode_config: DecodeConfig = DecodeConfig(),
        drafter: Drafter | None = None,
        spare: Callable[[], Drafter] | None = None,
    ):
        self.model = model
        self.decode_config = decode_config
        self.drafter = drafter
        self._spare = spare
        self._encoder = Encoder(model)
        self.params = model.params
        self.branch = drafter.branch if drafter else None
        checks.check_same_devices(self.params, self.branch)
        self.ngrams = None if drafter is None or drafter.ngrams is None else self._place_everywhere(drafter.ngrams)
        in_float32 = self.branch is not None and self.branch.head.dtype == jnp.float32
        if in_float32 and self._mesh is None and ops.pack_codes.kernels():
            self.branch = with_codes(self.branch)

    @functools.cached_property
    def with_branch(self) -> "Engine":
        """The same, with the branch in all that drafts; itself, where there is none to be had, or it is there already."""
        return self if self._spare is None else Engine(self.model, self.decode_config, self._spare())

    @property
    def has_chat_template(self) -> bool:
        return self._encoder.has_chat_template

    def encode(self, prompt: Prompt, *, chat: bool | None = None, split_special_tokens: bool | None = None) -> list[int]:
        """Token ids of a prompt: through the chat template (messages, or a text as one user message) or as plain text.

        Args:
          prompt: a text, or messages with `role` and `content`.
          chat: whether a text goes through the chat template; by default if the model has one.
          split_special_tokens: whether names of control tokens (`<|im_end|>`) in the prompt are text like any other, so that nobody can
            end or begin a turn by typing them. By default in chats, where only the template writes control tokens; in a plain text they
            are what they say.

        Raises:
          UserError: messages or chat=True without a template, messages that the template refuses, an empty prompt, or one
            longer than the context.
        """
        return self._encoder.encode(prompt, chat, split_special_tokens, "prompt")

    def generate(self, prompt: Prompt, *, seed: int | None = None, **options) -> Generation:
        """Generates one text; see `generate_ids` for the options, and `encode` for `chat` and `split_special_tokens`."""
        encode = self._take_encoding(options)
        return self.generate_ids([encode(prompt, what="prompt")], seeds=[self._seed(seed)], **options)[0]

    def generate_batch(self, prompts: Sequence[Prompt], *, seeds: Sequence[int] | None = None, **options) -> list[Generation]:
        """Generates one text a prompt, all in one batch; row i draws with `seeds[i]`, by default the configured seed + i.

        One text, or one list of messages, is one prompt. Other options are those of `generate`.
        """
        encode = self._take_encoding(options)
        if isinstance(prompts, str) or checks.is_conversation(prompts):
            prompts = [prompts]
        prompts = checks.items(prompts, "prompts", "texts, or lists of messages")
        seeds = range(self.decode_config.seed, self.decode_config.seed + len(prompts)) if seeds is None else seeds
        return self.generate_ids([encode(prompt, what=f"prompts[{i}]") for i, prompt in enumerate(prompts)], seeds=seeds, **options)

    def stream(self, prompt: Prompt, *, seed: int | None = None, **options) -> Iterator[str]:
        """Generates one text and yields it in pieces that never split a character; the generator's return value is the `Generation`.

        Options are those of `generate`. What is wrong with the arguments is raised here, not when the first piece is asked for.
        """
        encode = self._take_encoding(options)
        checked = checks.options(options, self.decode_config)
        return self._stream([encode(prompt, what="prompt")], [self._seed(seed)], self._ready(1, checked))

    def _seed(self, seed: int | None) -> int:
        return self.decode_config.seed if seed is None else integer(seed, "seed")

    def _take_encoding(self, given: dict[str, Any]) -> Callable[..., list[int]]:
        """Takes out of the keywords of a call those that are about encoding, and returns what encodes by them."""
        return functools.partial(self._encoder.encode, **{name: given.pop(name, None) for name in checks.ENCODING})

    def _stream(self, prompts: list[list[int]], seeds: list[int], options: checks.Options) -> Iterator[str]:
        run = self._run(prompts, seeds, options, self.decode_config.stream_chunk)
        while True:
            try:
                piece = next(run)[0]
            except StopIteration as end:
                return end.value[0]
            if piece:
                yield piece

    def generate_ids(self, prompts: Sequence[Sequence[int]], *, seeds: Sequence[int], **options) -> list[Generation]:
        """Generates from token ids, all prompts in one batch.

        Args:
          prompts: token ids of each row.
          seeds: one a row, any integers. What a row draws depends on its seed and its prompt alone in plain decoding and where only lookup
            drafts; with a branch also on what is drafted, which depends on the other rows with all controllers but `fixed:K` (and, where
            only the branch drafts, `threshold:t`, `beta` and `calibrated`). The law is the same in any case. See docs/decoder.md.
          stop: texts that end an answer; they are cut off. A text is one of them.
          sampling (SamplingConfig): how tokens are drawn, for all rows; greedy by default.
          temperature, top_k, top_p, min_p: fields of `sampling`, one by one.
          max_new_tokens (int): budget of each row, by default the configured one.
          batch_size (int): rows of the compiled program; empty rows are added up to it, and to a multiple of the mesh's data axis.
          controller (Controller, or its name; see `controller`): how many tokens to draft; None for plain decoding; by default
            `auto`, which is `cost_aware` where something drafts, else plain.

        Raises:
          UserError: an argument that cannot be used, named with its place and value; nothing was computed then.
        """
        checked = checks.options(options, self.decode_config)
        rows = checks.rows(prompts, self.model.config)
        seeds = checks.seeds(seeds, len(rows))
        if not rows:
            return []
        # Stop strings are text, which only the host can see: it looks every few tokens. Without them it need only notice Ctrl-C.
        chunk = self.decode_config.stream_chunk if checked.stop else self.decode_config.chunk
        run = self._run(rows, seeds, self._ready(len(rows), checked), chunk)
        while True:
            try:
                next(run)
            except StopIteration as end:
                return end.value

    def _ready(self, rows: int, options: checks.Options) -> checks.Options:
        """Options for so many rows, with the batch that will be run and the controller itself in place of its name."""
        batch = math.ceil(max(options.batch_size, rows) / self._row_shares) * self._row_shares
        controller = None if options.controller is None else self.controller(options.controller, batch=batch)
        return dataclasses.replace(options, batch_size=batch, controller=controller)

    def _run(self, prompts: list[list[int]], seeds: list[int], options: checks.Options, chunk: int) -> Iterator[list[str]]:
        """Yields each row's new text after every call of the loop, and returns the generations; options as from `_ready`."""
        batch, controller = options.batch_size, options.controller
        started = time.perf_counter()
        state = self.prefill(prompts, seeds, batch, options.max_new_tokens, controller)
        rows = [_Row(TextStream(self.model.tokenizer, options.stop, self.model.eos_ids), len(prompt)) for prompt in prompts]
        first_token_seconds = 0.0
        steps = 1  # the first token alone, so that its time is seen
        while any(row.finish == RUNNING for row in rows):
            state = self.decode(state, options.sampling, controller, steps)
            tokens, length, finish = self._fetch((state.tokens, state.length, state.finish))
            elapsed = time.perf_counter() - started
            first_token_seconds = first_token_seconds or elapsed
            yield [_take(row, tokens[i], length[i], finish[i], elapsed) for i, row in enumerate(rows)]
            if any(row.finish != finish[i] for i, row in enumerate(rows)):
                ends = np.array([row.finish for row in rows] + [LENGTH] * (batch - len(rows)), np.int32)
                state = state._replace(finish=jax.device_put(ends, state.finish.sharding))
            steps = chunk
        log = None if state.draft is None else self._fetch(state.draft.log)
        generations = []
        for i, row in enumerate(rows):
            count = row.text.num_tokens
            rounds = Rounds.plain(count) if log is None else Rounds.of_row(log, i).cut(count)
            token_ids = tokens[i, row.prompt_tokens :][:count].tolist()
            reason = _FINISH_REASONS[row.finish]
            generations.append(Generation(row.text.text, token_ids, row.prompt_tokens, reason, rounds, row.seconds, first_token_seconds))
        return generations

    def controller(self, name: str | Controller, *, batch: int = 1) -> Controller | None:
        """Makes the controller of that name (docs/controllers.md, or `auto`, see `generate_ids`); None for `plain`.

        Args:
          name: or a controller, which is given what its name would add: the bandit before it, where lookup drafts too.
          batch: rows that will be generated at once; what rounds of so many rows cost is measured, where the controller needs it, the
            first time on this machine.

        Raises:
          UserError: an unknown name or value, or nothing to draft with.
        """
        drafter, name = self.drafter, checks.controller(name)
        if name is None:
            return None
        if name == AUTO:
            name = DEFAULT_CONTROLLER if drafter else PLAIN
        if isinstance(name, str):
            made = parse_controller(name, drafter.draft.max_draft if drafter else DraftConfig.max_draft)
            if made.kind == PLAIN:
                return None
            kind = made.controller
        else:
            made = kind = name
        if drafter is None:
            raise UserError(f"controller {shown(name)} needs an exit branch or lookup, and there is neither; expected plain")
        if self._spare is not None and kind.needs_branch:
            return self.with_branch.controller(name, batch=batch)
        if drafter.branch is None and kind.needs_branch:
            expected = "expected plain, fixed:K or cost_aware, or the exit branch (--arms=exit, in a program arms=['exit'])"
            raise UserError(f"controller {shown(name)} needs an exit branch, and only lookup drafts; {expected}")
        return drafter.controller(made, timing.round_costs(self, batch) if drafter.needs_costs(kind) else None)

    def prefill(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], batch: int, budget: int, controller: Controller | None = None
    ) -> DecodeState:
        """Pads the prompts to their bucket, adds empty rows up to `batch`, and runs them through the model."""
        if self._needs_more(controller):
            return self.with_branch.prefill(prompts, seeds, batch, budget, controller)
        options, config = self.decode_config, self.model.config
        prompts, budget = checks.rows(prompts, config), checks.positive(budget, "max_new_tokens")
        if batch % self._row_shares:
            raise UserError(f"a batch of {batch} rows over a mesh whose data axis is {self._row_shares}; expected a multiple of it")
        empty_rows = batch - len(prompts)
        lengths = np.array([len(prompt) for prompt in prompts] + [1] * empty_rows, np.int32)
        limits = np.array([min(len(prompt) + budget, config.context_length) for prompt in prompts] + [1] * empty_rows, np.int32)
        drafter = self.drafter if controller is not None else None
        # A round writes up to max_draft + 1 entries behind a row's last but one token, whatever the budget.
        room = 0 if drafter is None else drafter.draft.max_draft + 1
        chunk = options.prompt_buckets[-1]
        padded, capacity = bucket_shapes(options, int(lengths.max()), int(limits.max()) + room)
        tokens = np.zeros((batch, padded), np.int32)
        for row, prompt in zip(tokens, prompts, strict=False):
            row[: len(prompt)] = prompt
        numbers = np.array([_to_32_bits(seed) for seed in checks.seeds(seeds, len(prompts))] + [0] * empty_rows, np.uint32)

        def run(rows: slice, padded: int) -> Prefilled:
            keys = _row_keys(self._place_rows(numbers[rows]))
            return _prefill(
                config,
                self.params,
                self.branch if drafter else None,
                *self._place_rows((tokens[rows, :padded], lengths[rows], limits[rows], keys)),
                exit_layer=drafter.draft.exit_layer if drafter else config.num_layers,
                capacity=capacity,
                chunk=chunk,
            )

        alone_on_cpu = self._mesh is None and jax.default_backend() == "cpu"
        if alone_on_cpu and worth_one_by_one(options, lengths[: len(prompts)], batch):
            own = [padded if length > chunk else padded_length(options, length) for length in lengths]
            state, exits = one_by_one(lambda row: run(slice(row, row + 1), own[row]), len(prompts), batch)
        else:
            state, exits = run(slice(None), padded)
        if controller is None:
            return state
        state = _start_drafting(drafter.draft, self.branch, controller, state, exits)
        # What it adds lies where the rest of a row does: for arrays that lie elsewhere the program would be compiled again.
        added = self._place_rows(state.draft._replace(exit_cache=None))
        return state._replace(draft=added._replace(exit_cache=state.draft.exit_cache))

    def decode(self, state: DecodeState, sampling: SamplingConfig, controller: Controller | None, max_steps: int) -> DecodeState:
        """Runs up to `max_steps` steps (rounds); `state` is used up."""
        if self._needs_more(controller):
            return self.with_branch.decode(state, sampling, controller, max_steps)
        model = self.model
        settings = _sampling_arrays(sampling, state.length.shape[0], self.rows_home)
        eos_ids, steps = np.array(model.eos_ids, np.int32), np.int32(max_steps)
        if controller is None:
            return _decode_plain(model.config, eos_ids, self.params, settings, state, steps)
        return _decode_speculative(self.speculation(controller, settings), state, steps)

    def speculation(self, controller: Controller, sampling: Sampling) -> Speculation:
        """Gathers what rounds of this engine read."""
        return Speculation(
            config=self.model.config,
            draft=self.drafter.draft,
            controller=controller,
            eos_ids=np.array(self.model.eos_ids, np.int32),
            params=self.params,
            branch=self.branch,
            sampling=sampling,
            ngrams=self.ngrams,
        )

    def _needs_more(self, controller: Controller | None) -> bool:
        """Whether a controller is one for the branch, which this engine leaves to those that need it."""
        alone = isinstance(controller, Arms) and controller.inner is None
        return self._spare is not None and controller is not None and not alone

    @property
    def _mesh(self) -> Mesh | None:
        return sharding.mesh_of(self.model.params["final_norm"])

    @property
    def _row_shares(self) -> int:
        """Into how many parts the rows of a batch are split."""
        return 1 if self._mesh is None else self._mesh.shape["data"]

    @property
    def _spans_processes(self) -> bool:
        return self._mesh is not None and self._mesh.is_multi_process

    @property
    def rows_home(self) -> NamedSharding | None:
        """Where rows lie, if they are spread, or other processes have to have them as well."""
        return sharding.decode_rows_home(self._mesh) if self._row_shares > 1 or self._spans_processes else None

    def _fetch(self, tree: Any) -> Any:
        """Arrays of a state as numpy, whole, also those whose rows other processes hold."""
        if self._spans_processes:
            tree = jax.jit(_as_they_are, out_shardings=NamedSharding(self._mesh, PartitionSpec()))(tree)
        return jax.device_get(tree)

    def _place_everywhere(self, array: np.ndarray) -> jax.Array:
        """An array that all devices read."""
        return jnp.asarray(array) if self._mesh is None else jax.device_put(array, NamedSharding(self._mesh, PartitionSpec()))

    def _place_rows(self, tree: Any) -> Any:
        """A pytree of arrays [B, ...], each row on the devices that decode it."""
        home = self.rows_home
        return tree if home is None else jax.device_put(tree, home)


def _as_they_are(tree: Any) -> Any:
    return tree


def _to_32_bits(seed: int) -> int:
    """What a key is made of. Larger and negative seeds are hashed: cut off, two that differ by 2 ** 32 would draw the same."""
    return seed if 0 <= seed < 2**32 else int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "little")


@functools.cache
def _sampling_arrays(config: SamplingConfig, batch: int, home: NamedSharding | None) -> Sampling:
    # As the programs hold them: what is below the least float32 would be neither greedy nor a number to divide by.
    least, most = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    temperature = min(float(config.temperature), most) if config.temperature >= least else 0.0
    return Sampling(
        temperature=jnp.full(batch, temperature, jnp.float32, device=home),
        top_k=jnp.full(batch, min(config.top_k, np.iinfo(np.int32).max), jnp.int32, device=home),
        top_p=jnp.full(batch, max(float(config.top_p), least), jnp.float32, device=home),
        min_p=jnp.full(batch, config.min_p, jnp.float32, device=home),
    )


def _take(row: _Row, tokens_S: np.ndarray, length: int, finish: int, elapsed: float) -> str:
    """Moves a row's new tokens into its text, ends the row where they end it, and returns the text to show."""
    if row.finish != RUNNING:
        return ""
    piece = row.text.push(tokens_S[row.prompt_tokens + row.text.num_tokens : length])
    if finish != RUNNING and not row.text.stopped:
        piece += row.text.close()
    row.finish = STOPPED if row.text.stopped else int(finish)
    row.seconds = elapsed
    return piece
