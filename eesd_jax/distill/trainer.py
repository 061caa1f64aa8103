"""Trains an exit branch: the loop around `step.py`, with everything that makes a run survive (checkpoints, resume, SIGTERM) and visible.

OUTPUT_DIR gets `checkpoints/`, `metrics.jsonl`, `tensorboard/`, and at the end `training.png` and `exit_branch/`, which decoding loads.
A run that was killed at any moment and is started again ends with the very parameters of one that was not: all that a step depends on is
in the checkpoint or follows from the config. There is no other randomness than the order of the data.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import json
import math
import pathlib
import signal
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from eesd_jax import experiment
from eesd_jax.config import DecodeConfig, DraftConfig, ExperimentConfig
from eesd_jax.decode.controllers import Calibration, Fixed
from eesd_jax.distill import data, step, teacher
from eesd_jax.distill.data import Batch
from eesd_jax.distill.monitor import Monitor
from eesd_jax.engine import Drafter, Engine
from eesd_jax.errors import UserError
from eesd_jax.generation import Rounds
from eesd_jax.hardware import find_chip
from eesd_jax.model import cpu_rows, exit_branch, sharding
from eesd_jax.weights import branch_folder
from eesd_jax.weights.checkpoint import Checkpoints, refuse_other
from eesd_jax.weights.load import LoadedModel, load_model

# Fields that may differ between the parts of one run: where it runs, what it shows, and what made the data (which has a fingerprint).
_FREE_FIELDS = ("output_dir", "mesh", "checkpoint", "evaluation", "self_generate", "data.path", "cache.path")
_PROMPT_TOKENS = 256
_CALIBRATION_BATCHES = 32
STOPPED_BY_SIGNAL = 128 + signal.SIGTERM


class Result(NamedTuple):
    """How a run ended. step: steps done. stopped: by SIGTERM, with a checkpoint to go on from. metrics: the last held-out ones."""

    step: int
    stopped: bool
    metrics: dict[str, float]


def train(config: ExperimentConfig) -> Result:
    """Runs an experiment from where it stands to its end.

    Raises:
      UserError: what cannot be of config, model, data or devices, a checkpoint of another experiment, or a loss that is no number.
    """
    output = _check(config)
    mesh = make_mesh(config)
    exported = output / "exit_branch" / branch_folder.INFO_NAME
    if exported.exists():
        return _finished(config, output, exported)
    dtype = config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    with cpu_rows.on_mesh(mesh.size > 1):
        return _Run(config, output, mesh, load_model(config.model, jnp.dtype(dtype), mesh)).train()


def _check(config: ExperimentConfig) -> epath.Path:
    """What can be known to be wrong before anything is loaded."""
    if not config.output_dir:
        raise UserError("output_dir is empty; expected a folder for checkpoints and results")
    for name, value in (("steps", config.steps), ("batch_size", config.batch_size), ("optimizer.accumulate", config.optimizer.accumulate)):
        if value < 1:
            raise UserError(f"{name} is {value}; expected an integer >= 1")
    for name in ("every", "keep"):
        if getattr(config.checkpoint, name) < 1:
            raise UserError(f"checkpoint.{name} is {getattr(config.checkpoint, name)}; expected an integer >= 1")
    if config.dtype not in ("", "float32", "bfloat16"):
        raise UserError(f"dtype is {config.dtype!r}; expected float32, bfloat16, or nothing for the device's own")
    if config.batch_size % config.optimizer.accumulate:
        raise UserError(f"batch_size is {config.batch_size}; expected a multiple of optimizer.accumulate, {config.optimizer.accumulate}")
    if config.cache.enabled:
        if config.cache.dtype not in ("float16", "float32"):
            raise UserError(f"cache.dtype is {config.cache.dtype!r}; expected float16 or float32")
        if jax.process_count() > 1:
            raise UserError(f"cache.enabled is True with {jax.process_count()} processes; expected one process, or cache.enabled=False")
    return epath.Path(config.output_dir)


def check_cache(config: ExperimentConfig, vocab_size: int) -> None:
    """Raises UserError for a loss that needs more of the target's distribution than the cache keeps."""
    kept = config.cache.top_tokens
    if not 1 <= kept <= vocab_size:
        raise UserError(f"cache.top_tokens is {kept}; expected 1 to {vocab_size}, the size of the vocabulary")
    needy = [name for name in ("reverse_kl", "total_variation") if getattr(config.loss, name)]
    if needy and kept < vocab_size:
        raise UserError(
            f"loss.{needy[0]} needs the whole distribution of the target, and the cache keeps {kept} tokens of {vocab_size}; "
            f"expected cache.enabled=False, cache.top_tokens={vocab_size}, or another loss"
        )


def make_mesh(config: ExperimentConfig) -> Mesh:
    """The mesh that the config asks for, over all devices; raises UserError where it does not match them or the batch."""
    wanted = {name: getattr(config.mesh, name) for name in sharding.MESH_AXES}
    devices = jax.device_count()
    open_axes = [name for name, size in wanted.items() if size == -1]
    fixed = math.prod(size for size in wanted.values() if size != -1)
    text = " x ".join(f"{name} {size}" for name, size in wanted.items())
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in wanted.values()):
        raise UserError(f"mesh is {text}; expected positive sizes, and -1 (all that is left) for one axis at most")
    if open_axes:
        if devices % fixed:
            raise UserError(f"mesh is {text}, and there are {devices} devices; expected sizes whose product divides them")
        wanted[open_axes[0]] = devices // fixed
    if math.prod(wanted.values()) != devices:
        raise UserError(f"mesh is {text}, which is {math.prod(wanted.values())} devices; expected {devices}, all that there are")
    rows = config.batch_size // config.optimizer.accumulate
    if rows % (shards := wanted["data"] * wanted["fsdp"]):
        raise UserError(
            f"batch_size is {config.batch_size} in {config.optimizer.accumulate} parts of {rows}; expected parts that are a multiple of "
            f"{shards}, the mesh's data x fsdp"
        )
    return sharding.make_mesh(jax.devices(), **wanted)


def _finished(config: ExperimentConfig, output: epath.Path, exported: epath.Path) -> Result:
    training = json.loads(exported.read_text())["training"]
    refuse_other(training["config"], comparable(config), str(output))
    return Result(training["steps"], False, training["held_out"])


def comparable(config: ExperimentConfig) -> dict[str, Any]:
    """The fields that make an experiment what it is, by their dotted names."""

    def flatten(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            path = prefix + name
            if path in _FREE_FIELDS:
                continue
            if isinstance(value, dict):
                yield from flatten(value, f"{path}.")
            else:
                yield path, value

    return dict(flatten(experiment.to_dict(config), ""))


class _Run:
    """One experiment at work. Attributes are set once, in the order in which each needs the ones before."""

    def __init__(self, config: ExperimentConfig, output: epath.Path, mesh: Mesh, model: LoadedModel):
        self.config, self.output, self.mesh = config, output, mesh
        self.model_config, self.tokenizer, self.eos_ids = model.config, model.tokenizer, model.eos_ids
        branch_config = config.branch
        exit_branch.check_exit_layer(model.config, branch_config.exit_layer)
        if not 0 <= branch_config.draft_vocab <= model.config.vocab_size:
            raise UserError(f"branch.draft_vocab is {branch_config.draft_vocab}; expected 0 (all) to {model.config.vocab_size}")
        if config.data.sequence_length > model.config.context_length:
            raise UserError(
                f"data.sequence_length is {config.data.sequence_length}; "
                f"expected at most the context of model {config.model!r}, {model.config.context_length}"
            )
        if config.cache.enabled:
            check_cache(config, model.config.vocab_size)
        self.rows, self.held_out = (data.open_split(config.data, output / "dataset", split, model) for split in ("train", "validation"))
        self.fingerprint = branch_folder.fingerprint(model.params)
        self.step_config = step.StepConfig(model.config, config.loss, config.optimizer, config.steps, online=not config.cache.enabled)
        branch = self._new_branch(model)
        self.initial = step.init_state(self.step_config, branch, train_head=branch_config.train_head)
        # From here on the blocks are stacked; the model's own are gone.
        trunk = teacher.split_trunk(model.config, model.params, branch_config.exit_layer)
        self.frozen = step.Frozen(trunk, branch.head, branch.draft_ids)
        self.batch_home = teacher.batch_sharding(mesh)
        self.identity = comparable(config) | {"model.fingerprint": self.fingerprint, "data.fingerprint": self.rows.fingerprint}

    def _new_branch(self, model: LoadedModel) -> exit_branch.ExitBranch:
        config = self.config.branch
        draft_ids = None
        if config.draft_vocab:
            counts = data.token_counts(self.rows, model.config.vocab_size)
            draft_ids = np.sort(np.argsort(-counts, kind="stable")[: config.draft_vocab])
        branch = exit_branch.init_exit_branch(model.config, model.params, config.exit_layer, config.start, draft_ids)
        homes = exit_branch.exit_branch_shardings(model.config, branch.draft_ids.size, self.mesh)
        return jax.tree.map(jax.device_put, branch, homes)

    def train(self) -> Result:
        """From the last checkpoint to the exported branch."""
        with contextlib.ExitStack() as stack:
            monitor = stack.enter_context(Monitor(self.output, self.config.steps, writes=jax.process_index() == 0))
            features = self._fill_caches(monitor)
            checkpoints = stack.enter_context(Checkpoints(self.output / "checkpoints", self.config.checkpoint.keep, self.identity))
            loader = data.make_loader(self.rows, self.config.batch_size, self.config.seed, jax.process_index(), jax.process_count())
            state, iterator = checkpoints.restore(self.initial)
            if iterator is not None:
                loader.set_state(iterator)
            terminated = stack.enter_context(_on_sigterm())
            done = int(state.step)
            monitor.start(done)
            state, done, stopped, metrics = self._loop(state, done, loader, features, checkpoints, monitor, terminated)
            if stopped:
                return Result(done, True, metrics)
            held_out = self._export(state, features, monitor)
        return Result(done, False, held_out)

    def _loop(self, state, done, loader, features, checkpoints, monitor, terminated):
        config = self.config
        run_step = jax.jit(step.train_step, static_argnums=0, donate_argnums=2)
        pending: tuple[int, step.Metrics, int] | None = None
        chip = find_chip(jax.devices()[0].device_kind)
        peak = chip.flops * jax.device_count() if chip else None
        draft_vocab = self.frozen.draft_ids.size
        flops = step.position_flops(
            self.model_config, draft_vocab, online=self.step_config.online, train_head=self.initial.trained.head is not None
        )

        def settle() -> None:
            """Waits for the metrics of the step before, while the next one runs."""
            nonlocal pending
            if pending is None:
                return
            at, metrics, tokens = pending
            pending = None
            values = {name: float(value) for name, value in jax.device_get(metrics)._asdict().items()}
            if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
                checkpoints.wait()
                raise UserError(
                    f"the loss of step {at} is {values['loss']}, its gradient {values['grad_norm']}; the last good checkpoint is of step "
                    f"{checkpoints.latest}; expected finite numbers: try a lower optimizer.learning_rate or optimizer.clip_norm"
                )
            monitor.step(at, values, tokens, flops, peak)

        with concurrent.futures.ThreadPoolExecutor(1) as reader:
            read = functools.partial(self._read, loader, features)
            upcoming = reader.submit(read) if done < config.steps else None
            metrics = {}
            while done < config.steps:
                batch, found, iterator, tokens = upcoming.result()
                if done + 1 < config.steps:
                    upcoming = reader.submit(read)
                state, step_metrics = run_step(self.step_config, self.frozen, state, batch, found)
                done += 1
                settle()
                pending = (done, step_metrics, tokens * jax.process_count())
                stop = _should_stop(terminated, done)
                last = done == config.steps
                if stop or last or done % config.checkpoint.every == 0:
                    settle()  # nothing that is not finite is ever saved
                    checkpoints.save(done, state, iterator)
                if stop and not last:
                    checkpoints.wait()
                    return state, done, True, metrics
                if not last and config.evaluation.every and done % config.evaluation.every == 0:
                    settle()
                    metrics = self._evaluate(state.trained, features)
                    monitor.evaluation(done, metrics)
            settle()
            checkpoints.wait()
        return state, done, False, metrics

    def _read(self, loader, features) -> tuple[Batch, teacher.Features | None, Any, int]:
        """The next batch on its devices, its cached features, and where the iterator stands behind it."""
        batch = next(loader)
        found = features["train"].read(batch.row, batch.tokens.shape[1]) if features else None
        return *self._place(batch, found), loader.get_state(), int(np.count_nonzero(batch.segments))

    def _place(self, batch: Batch, features: teacher.Features | None) -> tuple[Batch, teacher.Features | None]:
        def place(leaf: np.ndarray) -> jax.Array:
            return jax.make_array_from_process_local_data(self.batch_home, leaf)

        return jax.tree.map(place, (batch, features))

    def _fill_caches(self, monitor: Monitor) -> dict[str, teacher.FeatureCache] | None:
        config = self.config
        if not config.cache.enabled:
            return None
        folder = pathlib.Path(config.cache.path or str(self.output / "cache"))
        needs_last = bool(config.loss.regression)
        compute = jax.jit(self._features_to_keep, static_argnums=1)
        caches = {}
        for name, rows in (("train", self.rows), ("validation", self.held_out)):
            provenance = {
                "model": self.fingerprint,
                "data": rows.fingerprint,
                "exit_layer": config.branch.exit_layer,
                "dtype": config.cache.dtype,
            }
            length, hidden = config.data.sequence_length, self.model_config.hidden_size
            cache = teacher.FeatureCache(folder / name, provenance, len(rows), length, hidden, top=config.cache.top_tokens, last=needs_last)
            caches[name] = cache
            if not cache.complete:
                batch_size = config.batch_size

                def run(batch: Batch) -> teacher.Features:
                    return compute(self._place(batch, None)[0], needs_last)

                monitor.follow(f"caching {name}", cache.fill(rows, batch_size, run), len(rows), cache.rows, length)
        return caches

    def _features_to_keep(self, batch: Batch, needs_last: bool) -> teacher.Features:
        hidden, last = teacher.hidden_states(self.model_config, self.frozen.trunk, batch, last=True)
        top = teacher.top_tokens(self.frozen.trunk, last, self.config.cache.top_tokens, self.config.loss.chunk)
        return teacher.Features(hidden, last if needs_last else None, top)

    def _held_out_batches(self, features, limit: int) -> Iterator[tuple[Batch, teacher.Features | None]]:
        size, share = self.config.batch_size, self.config.batch_size // jax.process_count()
        for first in range(0, min(len(self.held_out), limit * size), size):
            places = [min(first + i, len(self.held_out) - 1) for i in range(size)]
            own = places[jax.process_index() * share : (jax.process_index() + 1) * share]
            parts = [self.held_out[i] for i in own]
            batch = Batch(*(np.stack(field) for field in zip(*parts, strict=True)))
            # Rows that only fill up the last batch do not count.
            real = np.array([first + jax.process_index() * share + i < len(self.held_out) for i in range(share)])
            batch = batch._replace(loss_mask=batch.loss_mask & real[:, None])
            yield self._place(batch, features["validation"].read(batch.row, batch.tokens.shape[1]) if features else None)

    def _evaluate(self, trained: step.Trained, features) -> dict[str, float]:
        """Held-out means, and what the real decoder makes of the branch."""
        evaluation = self.config.evaluation
        values: dict[str, float] = {}
        run = jax.jit(step.evaluate, static_argnums=0)
        sums = [run(self.step_config, self.frozen, trained, *batch)[0] for batch in self._held_out_batches(features, evaluation.batches)]
        if sums:
            totals = [sum(float(value) for value in column) for column in zip(*sums, strict=True)]
            positions = max(totals[-1], 1.0)
            values |= {name: value / positions for name, value in zip(step.losses.Totals._fields[:-1], totals, strict=False)}
        if evaluation.rollouts and jax.process_count() == 1 and len(self.held_out.examples):
            values |= self._roll_out(trained)
        return values

    def _roll_out(self, trained: step.Trained) -> dict[str, float]:
        """Greedy text of the real decoder on held-out prompts: tokens per round, and acceptance at each place of a round."""
        evaluation = self.config.evaluation
        trunk = self.frozen.trunk
        branch = step.to_branch(trained, self.frozen, trunk.embed.dtype)
        draft = DraftConfig(self.config.branch.exit_layer, evaluation.rollout_draft, verify_widths=())
        model = LoadedModel(self.model_config, teacher.join_trunk(self.model_config, trunk), self.tokenizer, self.eos_ids)
        engine = Engine(model, DecodeConfig(chunk=evaluation.rollout_tokens), Drafter(branch, draft, Calibration(), trained=True))
        examples = [self.held_out.examples[i] for i in range(min(evaluation.rollouts, len(self.held_out.examples)))]
        prompts = [example.tokens[: int(np.argmax(example.response))][-_PROMPT_TOKENS:].tolist() for example in examples]
        prompts = [prompt for prompt in prompts if prompt]
        if not prompts:
            return {}
        generations = engine.generate_ids(
            prompts,
            seeds=[0] * len(prompts),
            max_new_tokens=evaluation.rollout_tokens,
            controller=Fixed(evaluation.rollout_draft),
        )
        log = Rounds.join([generation.log for generation in generations])
        values = {"tokens_per_round": float(np.sum(log.committed) / max(len(log.committed), 1))}
        return values | {f"acceptance_{i + 1}": float(share) for i, share in enumerate(log.acceptance_by_position())}

    def _export(self, state: step.TrainState, features, monitor: Monitor) -> dict[str, float]:
        """Evaluates, fits the calibration, and writes the folder that decoding loads."""
        held_out = self._evaluate(state.trained, features)
        if held_out:
            monitor.evaluation(self.config.steps, held_out)
        calibration = self._fit_calibration(state.trained, features)
        branch = step.to_branch(state.trained, self.frozen, jnp.dtype(self.config.branch.save_dtype))
        config = self.model_config
        info = branch_folder.BranchInfo(
            exit_layer=self.config.branch.exit_layer,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            draft_vocab_size=branch.draft_ids.size,
            start=self.config.branch.start,
            calibration_slope=calibration.slope,
            calibration_intercept=calibration.intercept,
            target_config_hash=branch_folder.config_hash(config),
            target_fingerprint=self.fingerprint,
            training={
                "model": self.config.model,
                "steps": self.config.steps,
                "positions_seen": monitor.positions,
                "rows": len(self.rows),
                "response_tokens": self.rows.num_response_tokens,
                "data": self.rows.fingerprint,
                "held_out": held_out,
                "config": comparable(self.config),
            },
        )
        branch = jax.tree.map(_everywhere, branch) if jax.process_count() > 1 else branch
        if jax.process_index() == 0:
            monitor.plot()
            export(self.output / "exit_branch", branch, info)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("exported")
        return held_out

    def _fit_calibration(self, trained: step.Trained, features) -> Calibration:
        run = jax.jit(step.evaluate, static_argnums=0)
        batches = itertools.islice(self._held_out_batches(features, _CALIBRATION_BATCHES), _CALIBRATION_BATCHES)
        found = [run(self.step_config, self.frozen, trained, *batch)[1] for batch in batches]
        if jax.process_count() > 1:
            found = [jax.tree.map(_everywhere, item) for item in found]
        if not found:
            return Calibration()
        confidence, agrees, counts = (np.concatenate([np.asarray(leaf).ravel() for leaf in column]) for column in zip(*found, strict=True))
        return fit_calibration(confidence[counts], agrees[counts])


def _everywhere(leaf: jax.Array) -> np.ndarray:
    return multihost_utils.process_allgather(leaf, tiled=True)


def fit_calibration(confidence: np.ndarray, accepted: np.ndarray) -> Calibration:
    """Slope and intercept of a logistic regression of acceptance on the log odds of confidence (Platt 1999), by Newton's method.

    Args:
      confidence: [n] in [0, 1]. accepted: bool [n]. Where all or none were accepted, the identity remains.
    """
    if accepted.all() or not accepted.any():
        return Calibration()
    inputs = np.stack([np.asarray(Calibration().log_odds(jnp.asarray(confidence)), np.float64), np.ones(len(confidence))], axis=1)
    weights = np.array([1.0, 0.0])
    # A little pull towards the identity keeps separable data finite.
    pull, prior = 1e-3, np.array([1.0, 0.0])
    for _ in range(50):
        p = 1.0 / (1.0 + np.exp(-np.clip(inputs @ weights, -30, 30)))
        gradient = inputs.T @ (p - accepted) + pull * (weights - prior)
        hessian = (inputs * (p * (1 - p))[:, None]).T @ inputs + pull * np.eye(2)
        change = np.linalg.solve(hessian, gradient)
        weights = weights - np.clip(change, -2, 2)
        if np.abs(change).max() < 1e-9:
            break
    return Calibration(float(weights[0]), float(weights[1]))


def export(folder: epath.Path, branch: exit_branch.ExitBranch, info: branch_folder.BranchInfo) -> None:
    """Writes the branch's folder, local or in a bucket; `config.json`, which vouches for the rest, comes last."""
    if isinstance(folder, pathlib.PosixPath) and "://" not in str(folder):
        branch_folder.save_branch(str(folder), branch, info)
        return
    with tempfile.TemporaryDirectory() as local:
        branch_folder.save_branch(local, branch, info)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (branch_folder.TENSORS_NAME, branch_folder.INFO_NAME):
            (folder / name).write_bytes((pathlib.Path(local) / name).read_bytes())


@contextlib.contextmanager
def _on_sigterm() -> Iterator[list[int]]:
    """A list that is no longer empty once this process was asked to end."""
    received: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    except ValueError:  # not in the main thread: who called us handles signals
        yield received
        return
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def _should_stop(terminated: list[int], done: int) -> bool:
    """Whether some process was asked to end: all of them must save the same step."""
    if jax.process_count() == 1:
        return bool(terminated)
    return bool(multihost_utils.reached_preemption_sync_point(done)) or bool(terminated)
