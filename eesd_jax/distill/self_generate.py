"""Self-generation: the target writes the text that its exit branch is trained on.

Response i answers prompt i (from the first again where there are fewer prompts), with a temperature and a PRNG key that follow from i
alone. Process p of P makes the responses i with i % P == p, and appends each to a journal when it is complete. When all journals together
have all responses, the dataset is written from them in order. So a run may be killed at any moment and started again, also with another
number of processes: nothing is lost, nothing is made twice, and the dataset is the same to the byte.

    OUTPUT_DIR/responses/   journals (see `response_journal.py`)
    OUTPUT_DIR/features/    if wanted, what training reads of the target, kept as it writes (see `feature_file.py`)
    OUTPUT_DIR/dataset/     appears when it is complete (see `examples.py`)
"""

import dataclasses
import itertools
import json
import math
import os
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from eesd_jax.cluster.processes import check_shared
from eesd_jax.config import (
    NOT_QUANTIZED,
    PROMPT_BUCKETS,
    DecodeConfig,
    DraftConfig,
    ExperimentConfig,
    RefillConfig,
    SelfGenerateConfig,
)
from eesd_jax.decode.controllers import PLAIN, parse_controller
from eesd_jax.distill import examples, feature_file, prompt_source
from eesd_jax.distill.checks import check_against_model
from eesd_jax.distill.feature_file import FeatureWriter
from eesd_jax.distill.response_journal import Journal, check_same, check_settings_file
from eesd_jax.engine import conversations, engine
from eesd_jax.engine.engine import Engine
from eesd_jax.engine.kept import Keep
from eesd_jax.engine.prompts import Conversation, is_text
from eesd_jax.engine.scheduler import Refiller, Request, local_mesh
from eesd_jax.errors import UserError
from eesd_jax.weights.branch_folder import config_hash, fingerprint

FORMAT_VERSION = 1
USER_TEMPERATURE = 1.0  # at which the model writes the user's turn: as it is
_USER_ATTEMPTS = 20
_WAIT_SECONDS = 2.0  # between two looks at what the other processes have done
_PATIENCE_SECONDS = 60.0  # before a word is said about waiting
# Fields that change how fast text is made, or where it is, but not what it says.
_NOT_TEXT = ("batch_size", "prompts")
_USER_STREAM, _ANSWER_STREAM = 0, 1  # of keys


class Summary(NamedTuple):
    """What a run did. responses, tokens: made by it, here. seconds: of making them. folder: of the dataset."""

    responses: int
    tokens: int
    seconds: float
    folder: str

    @property
    def line(self) -> str:
        if not self.responses:
            return f"nothing left to generate; dataset: {self.folder}"
        rate = self.tokens / self.seconds
        return f"{self.responses} responses, {self.tokens} tokens in {self.seconds:.1f} s ({rate:.1f} tokens/s); dataset: {self.folder}"


class Progress(NamedTuple):
    """For a progress bar. done, total: texts (user's turns and responses) of this process. tokens: of responses made by this run, here."""

    done: int
    total: int
    tokens: int


Watch = Callable[[Progress], None]


class Plan(NamedTuple):
    """What every response is: the same on every process.

    prompt: int64 [N], which prompt it answers. temperature: float32 [N], 0 for greedy.
    """

    prompt: np.ndarray
    temperature: np.ndarray


def plan_responses(config: SelfGenerateConfig, prompts: int, responses: int) -> Plan:
    """Spreads greedy responses evenly, and takes the temperatures in turn for the others.

    No prompt is answered greedily twice, which would give the same text: where prompts are used again, it is sampled.
    """
    temperature = np.zeros(responses, np.float32)
    sampled = itertools.cycle(config.temperatures)
    share = config.greedy_share
    for i in range(responses):
        again, prompt = divmod(i, prompts)
        phase = (prompt + again) * share  # a response is greedy where a multiple of 1 is passed; each round begins one step later
        first_passed = math.floor(phase) == math.floor(prompt * share)
        if not (math.floor(phase + share) > math.floor(phase) and first_passed):
            temperature[i] = next(sampled)
    return Plan(np.arange(responses) % prompts, temperature)


def check_settings(config: ExperimentConfig) -> None:
    """Finds what is wrong with the settings before anything slow is started; raises UserError."""
    ours = config.self_generate
    if not config.output_dir:
        raise UserError("output_dir is ''; expected a folder, as in --config.output_dir=runs/mine")
    if not ours.prompts:
        raise UserError(f"self_generate.prompts is ''; expected a JSONL file, tfds:NAME or {prompt_source.SELF}")
    for name, least in (("num_responses", 0), ("batch_size", 0), ("max_prompt_tokens", 1), ("max_new_tokens", 1), ("seed", 0)):
        if getattr(ours, name) < least:
            raise UserError(f"self_generate.{name} is {getattr(ours, name)}; expected an integer >= {least}")
    if not ours.temperatures or not all(0 < value < math.inf for value in ours.temperatures):
        raise UserError(
            f"self_generate.temperatures is {ours.temperatures}; expected positive numbers (greedy_share makes greedy responses)"
        )
    if not 0 <= ours.greedy_share <= 1:
        raise UserError(f"self_generate.greedy_share is {ours.greedy_share}; expected a number from 0 to 1")
    if not 0 <= ours.validation_share < 1:
        raise UserError(f"self_generate.validation_share is {ours.validation_share}; expected a number in [0, 1)")
    if ours.prompts == prompt_source.SELF and not ours.num_responses:
        raise UserError(
            f"self_generate.num_responses is 0, and prompts are {prompt_source.SELF!r}; expected how many the model should write"
        )
    if ours.features and (ours.controller != PLAIN or "://" in config.output_dir or ours.max_prompt_tokens > PROMPT_BUCKETS[-1]):
        raise UserError(
            f"self_generate.features is True with controller {ours.controller!r}, output_dir {config.output_dir!r} and max_prompt_tokens "
            f"{ours.max_prompt_tokens}; expected {PLAIN}, a folder of this machine, and at most {PROMPT_BUCKETS[-1]}"
        )
    controller = parse_controller(ours.controller, DraftConfig.max_draft)
    if (ours.exit_branch == "none") != (controller.kind == PLAIN):
        raise UserError(
            f"self_generate.exit_branch is {ours.exit_branch!r} and controller {ours.controller!r}; "
            f"expected none and {PLAIN}, or a branch and what is to draft with it"
        )


def self_generate(
    config: ExperimentConfig,
    *,
    process_index: int | None = None,
    process_count: int | None = None,
    watch: Watch | None = None,
) -> Summary:
    """Makes this process's responses; then waits for the others, and process 0 writes the dataset.

    Args:
      config: the experiment.
      process_index, process_count: by default those of JAX.
      watch: called as responses come in.

    Raises:
      UserError: settings that cannot be, or are not those that the folder was begun with; prompts or a model that cannot be read.
    """
    check_settings(config)
    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
    folder = _output_dir(config) / "dataset"
    check_shared(folder.parent, "output_dir")
    writes_prompts = config.self_generate.prompts == prompt_source.SELF
    prompts = None if writes_prompts else prompt_source.read(config.self_generate.prompts)
    settings = describe_settings(config, prompts)
    if examples.dataset_exists(folder):
        check_same(settings, _dataset_settings(folder, config), config.output_dir)
        return Summary(0, 0, 0.0, os.fspath(folder))
    # Before the model, which can take minutes; and nothing is written before there is one.
    check_settings_file(folder.parent / "responses", settings, config.output_dir)
    run = Run(config, prompts, local_mesh(config.mesh.fsdp * config.mesh.tensor))
    journal = Journal(folder.parent / "responses", settings, run.target, process_index, config.output_dir)
    made = run.generate(journal, process_index, process_count, watch)
    if process_count > 1:
        journal.mark_finished(process_count)
        others = f"for the other {process_count - 1} processes, which must write to the same output_dir ({config.output_dir!r})"
        if process_index:
            _wait(lambda: examples.dataset_exists(folder), others)
        else:
            _wait(lambda: journal.all_finished(process_count) and not run.missing(journal), others)
    if process_index == 0:
        run.write(journal, folder, settings)
    return made._replace(folder=os.fspath(folder))


def _output_dir(config: ExperimentConfig) -> epath.Path:
    try:
        path = epath.Path(config.output_dir).expanduser()
        if path.exists() and not path.is_dir():
            raise NotADirectoryError("it is no folder")
    except (OSError, ImportError, KeyError) as error:  # no library for that kind of address, or no such kind
        raise UserError(f"output_dir {config.output_dir!r} cannot be used ({error}); expected a folder") from None
    return path


def _wait(ready: Callable[[], bool], what_for: str) -> None:
    """Until it is; says so after a while."""
    for looks in itertools.count(1):
        if ready():
            return
        if looks * _WAIT_SECONDS == _PATIENCE_SECONDS:
            warnings.warn(f"waiting {what_for}", stacklevel=3)
        time.sleep(_WAIT_SECONDS)


def describe_settings(config: ExperimentConfig, prompts: Sequence[Conversation] | None) -> dict[str, Any]:
    """All that responses depend on, as JSON has it; prompts as in `Run`."""
    ours = {name: value for name, value in dataclasses.asdict(config.self_generate).items() if name not in _NOT_TEXT}
    kind = prompt_source.SELF if prompts is None else prompt_source.fingerprint(prompts)
    target = {"model": config.model, "dtype": config.dtype}
    # What was not always a field is left out at its default, so that responses that were begun before go on.
    if config.quantize != NOT_QUANTIZED:
        target["quantize"] = config.quantize
    if ours.pop("features"):
        target |= {f"features.{name}": value for name, value in dataclasses.asdict(_what_to_keep(config)).items()}
    return json.loads(json.dumps({"format_version": FORMAT_VERSION, "prompts": kind} | target | ours))


def _what_to_keep(config: ExperimentConfig) -> Keep:
    """Reads from the experiment what its training will ask of the target."""
    return Keep(config.branch.exit_layer, config.cache.top_tokens, config.cache.dtype)


def _dataset_settings(folder: epath.Path, config: ExperimentConfig) -> dict[str, Any]:
    try:
        settings = json.loads((folder / "metadata.json").read_text())["provenance"]["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(
            f"{os.fspath(folder)!r} was not written by train/self_generate.py; expected another output_dir than {config.output_dir!r}"
        )
    return settings


class Run:
    """A loaded model and its prompts, ready to make responses.

    Attributes:
      target: what identifies the model: hashes of its shape, its weights and its tokenizer.
      num_responses: of all processes.

    Args:
      config: the experiment.
      prompts: conversations whose first turns are answered; None where the model writes them.
      mesh: of this process's devices.
      engine: by default the model of the config, loaded.
      refill: pacing.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        prompts: Sequence[Conversation] | None,
        mesh: Mesh,
        engine: Engine | None = None,
        refill: RefillConfig = RefillConfig(),
    ):
        ours = config.self_generate
        self._config = config
        self._ours = ours
        self._mesh = mesh
        self._refill = refill
        self._rows = ours.batch_size or refill.rows * mesh.shape["data"]
        if self._rows % mesh.shape["data"]:
            raise UserError(f"self_generate.batch_size is {self._rows}; expected a multiple of {mesh.shape['data']}, the number of devices")
        self._engine = _load(config, mesh) if engine is None else engine
        if ours.features:  # before text is written beside which training could use nothing
            check_against_model(config, self._engine.model.config)
        self._controller = self._engine.controller(ours.controller, batch=self._rows)
        self._user_turn = prompt_source.UserTurn(self._engine) if prompts is None else None
        self._prompts, self._prompt_ids = ([], []) if prompts is None else self._encode(prompts)
        self.num_responses = ours.num_responses or len(self._prompts)
        repeated = self._user_turn is None and self.num_responses > len(self._prompts)
        if repeated and ours.greedy_share == 1:
            raise UserError(
                f"self_generate.num_responses is {self.num_responses}, all of them greedy, for {len(self._prompts)} prompts; "
                "expected no more than prompts, or a smaller greedy_share"
            )
        self._keep = _what_to_keep(config) if ours.features else None
        self._plan = plan_responses(ours, self.num_responses if self._user_turn else len(self._prompts), self.num_responses)
        model = self._engine.model
        self.target = {
            "target_config_hash": config_hash(model.config),
            "target_fingerprint": fingerprint(model.params),
            "tokenizer_hash": examples.tokenizer_hash(model.tokenizer),
            "vocab_size": model.config.vocab_size,
            "eos_ids": list(model.eos_ids),
            "dtype": str(model.params["final_norm"].dtype),
        }
        if ours.exit_branch != "none":
            self.target["exit_branch_fingerprint"] = fingerprint(self._engine.drafter.branch._asdict())

    def _encode(self, prompts: Sequence[Conversation]) -> tuple[list[Conversation], list[list[int]]]:
        """Prompts and their token ids; those that are too long are left out, with a warning."""
        kept, all_ids, limit = [], [], self._longest_prompt()
        for conversation in prompts:
            messages = [*conversation.history, {"role": "user", "content": conversation.turns[0]}]
            try:
                ids = conversations.encode(self._engine, messages, self._engine.has_chat_template)
            except UserError:
                ids = None
            if ids is not None and len(ids) <= limit:
                kept.append(conversation)
                all_ids.append(ids)
        if not kept:
            raise UserError(
                f"prompts {self._ours.prompts!r}: none of {len(prompts)} fits into {limit} tokens; expected a larger max_prompt_tokens"
            )
        if len(kept) < len(prompts):
            warnings.warn(
                f"{len(prompts) - len(kept)} of {len(prompts)} prompts are left out: more than {limit} tokens "
                "(self_generate.max_prompt_tokens), or refused by the chat template",
                stacklevel=3,
            )
        return kept, all_ids

    def _longest_prompt(self) -> int:
        # At least one token must be left for the response.
        return min(self._ours.max_prompt_tokens, self._engine.model.config.context_length - 1)

    def _request(self, index: int, prompt: list[int], temperature: float, limit: int) -> Request:
        room = self._engine.model.config.context_length - len(prompt)
        return Request(index, prompt, temperature, min(limit, room))

    def _prompt(self, index: int, journal: Journal) -> list[int]:
        """Token ids of what response `index` answers."""
        if self._user_turn is None:
            return self._prompt_ids[self._plan.prompt[index]]
        return self._engine.encode([{"role": "user", "content": journal.users[index]}])

    def generate(self, journal: Journal, process_index: int, process_count: int, watch: Watch | None = None) -> Summary:
        """Makes the responses of one process that are not in the journals yet."""
        own = range(process_index, self.num_responses, process_count)
        features = None if self._keep is None else self._feature_writer(journal, process_index)
        refiller = Refiller(self._engine, self._mesh, self._rows, self._controller, self._refill)
        key = jax.random.key(self._ours.seed % 2**32)
        parts = 1 if self._user_turn is None else 2
        done = sum((i in journal.users) + (i in journal.answers) for i in own)
        started, tokens, made = time.perf_counter(), 0, 0

        def report() -> None:
            if watch is not None:
                watch(Progress(done, parts * len(own), tokens))

        report()
        if self._user_turn is not None:
            pending = [i for i in own if i not in journal.users and i not in journal.answers]
            for index, text in self._user_turns(pending, refiller, jax.random.fold_in(key, _USER_STREAM)):
                journal.append({"index": index, "user": text})
                done += 1
                report()
            journal.flush()
        requests = (
            self._request(i, self._prompt(i, journal), float(self._plan.temperature[i]), self._ours.max_new_tokens)
            for i in own
            if i not in journal.answers
        )
        if features is not None:
            refiller = Refiller(self._engine, self._mesh, self._rows, None, self._refill, self._keep)
        for response in refiller.run(requests, jax.random.fold_in(key, _ANSWER_STREAM)):
            place = {}
            if features is not None:
                place["features"] = [process_index, features.append(response.kept), len(response.kept.hidden)]
            journal.append({"index": response.index, "tokens": response.tokens.tolist(), "ended": response.ended} | place)
            done, made, tokens = done + 1, made + 1, tokens + len(response.tokens)
            report()
        journal.flush()
        return Summary(made, tokens, time.perf_counter() - started, "")

    def _feature_writer(self, journal: Journal, process: int) -> FeatureWriter:
        """Opens the features of one process after those that the journals know."""
        model = self._engine.model
        about = feature_file.describe(
            self._keep, self.target["target_fingerprint"], model.config.hidden_size, model.params["final_norm"].dtype.name
        )
        return FeatureWriter(self._features_folder, about, process, journal.records_of(process))

    @property
    def _features_folder(self) -> pathlib.Path:
        return pathlib.Path(self._config.output_dir).expanduser() / "features"

    def _user_turns(self, pending: list[int], refiller: Refiller, key: jax.Array) -> Iterator[tuple[int, str]]:
        """The model writes user's turns, each again until it is one that can be answered."""
        header, longest = self._user_turn.header, self._longest_prompt()
        around = len(self._engine.encode([{"role": "user", "content": "a"}]))  # tokens of the template, and about one
        limit = min(self._ours.max_new_tokens, longest - around)
        if limit < 1:
            raise UserError(
                f"self_generate.max_prompt_tokens is {self._ours.max_prompt_tokens}; "
                f"expected more than the {around} tokens of the chat template"
            )
        for attempt in range(_USER_ATTEMPTS):
            requests = [self._request(i, header, USER_TEMPERATURE, limit) for i in pending]
            failed = []
            for response in refiller.run(requests, jax.random.fold_in(key, attempt)):
                text = self._user_turn.read(response.tokens)
                if self._can_be_answered(text, longest):
                    yield response.index, text
                else:
                    failed.append(response.index)
            pending = sorted(failed)
            if not pending:
                return
        raise UserError(
            f"prompts are {prompt_source.SELF!r}, and in {_USER_ATTEMPTS} attempts this model wrote no user's turn; expected prompts"
        )

    def _can_be_answered(self, text: str, longest: int) -> bool:
        if not is_text(text):
            return False
        try:
            return len(self._engine.encode([{"role": "user", "content": text}])) <= longest
        except UserError:  # the template refuses it
            return False

    def missing(self, journal: Journal) -> int:
        """How many responses the journals of all processes do not have yet."""
        journal.read()
        return sum(i not in journal.answers for i in range(self.num_responses))

    def write(self, journal: Journal, folder: epath.Path, settings: dict[str, Any]) -> None:
        """Writes the dataset from the journals of all processes.

        Raises:
          UserError: responses are missing.
        """
        if missing := self.missing(journal):
            raise UserError(f"{missing} of {self.num_responses} responses are missing; start every process again")
        prompts = [np.array(self._prompt(i, journal), np.int32) for i in range(self.num_responses)]
        chosen = examples.assign_splits(prompts, self._ours.validation_share)
        answers = [journal.answers[i] for i in range(self.num_responses)]
        texts = [np.concatenate([prompt, answer.tokens]) for prompt, answer in zip(prompts, answers, strict=True)]

        def records(split: str) -> Iterator[dict[str, Any]]:
            for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
                if chosen[i] == split:
                    yield {
                        "tokens": text,
                        "response": np.arange(len(text)) >= len(prompt),
                        "index": i,
                        "temperature": self._plan.temperature[i],
                        "prompt_id": f"self-{i}" if self._user_turn else str(self._prompts[self._plan.prompt[i]].id),
                    }

        provenance = {
            "model": self._config.model,
            **self.target,
            "settings": settings,
            "sampling": {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "user_temperature": USER_TEMPERATURE},
            "responses": self.num_responses,
            "response_tokens": sum(len(answer.tokens) for answer in answers),
            "prompt_tokens": sum(len(prompt) for prompt in prompts),
            "ended": sum(answer.ended for answer in answers),
            "greedy": int(np.count_nonzero(self._plan.temperature == 0)),
            "splits": {split: chosen.count(split) for split in examples.SPLITS},
        }
        if self._keep is not None:
            feature_file.write_index(self._features_folder, [answer.features for answer in answers], texts)
        examples.write_dataset(folder, {split: records(split) for split in examples.SPLITS}, provenance)


def _load(config: ExperimentConfig, mesh: Mesh) -> Engine:
    ours = config.self_generate
    options = {"dtype": config.dtype or None, "decode_config": DecodeConfig(seed=ours.seed), "exit_branch": ours.exit_branch}
    options |= {"quantize": config.quantize, "ngrams": "none"}  # which come of what is written here
    # A mesh of one device is no mesh: the programs are then the very ones that infer/generate.py compiles.
    return engine.load(config.model, mesh=mesh if mesh.size > 1 else None, **options)
