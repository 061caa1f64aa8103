"""Trains an exit branch: the loop around `step.py`, with everything that makes a run survive (checkpoints, resume, SIGTERM) and visible.

OUTPUT_DIR gets `checkpoints/`, `metrics.jsonl`, `tensorboard/`, and at the end `training.png` and `exit_branch/`, which decoding loads.
A run that was killed at any moment and is started again ends with the very parameters of one that was not: all that a step depends on is
in the checkpoint or follows from the config. There is no other randomness than the order of the data.
"""

import concurrent.futures
import contextlib
import functools
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from eesd_jax.cluster.hardware import find_chip
from eesd_jax.cluster.processes import check_shared
from eesd_jax.config import ExperimentConfig
from eesd_jax.distill import data, feature_file, step, teacher
from eesd_jax.distill.checks import check_against_model, check_config, check_given_branch, comparable, find
from eesd_jax.distill.data import Batch
from eesd_jax.distill.evaluation import Evaluation, on_every_host
from eesd_jax.distill.feature_file import FeatureReader
from eesd_jax.distill.layout import Layout, make_layout
from eesd_jax.distill.monitor import Monitor
from eesd_jax.distill.preemption import watch_for_sigterm
from eesd_jax.engine.kept import Keep
from eesd_jax.errors import UserError
from eesd_jax.model import exit_branch
from eesd_jax.weights import branch_folder
from eesd_jax.weights.checkpoint import Checkpoints, refuse_other
from eesd_jax.weights.load import LoadedModel, load_model


class Result(NamedTuple):
    """How a run ended. step: steps done. stopped: by SIGTERM, with a checkpoint to go on from. metrics: at the end, the held-out ones."""

    step: int
    stopped: bool
    metrics: dict[str, float]


def train(config: ExperimentConfig) -> Result:
    """Runs an experiment from where it stands to its end.

    Raises:
      UserError: what cannot be of config, model, data or devices, a checkpoint of another experiment, or a loss that is no number.
    """
    check_config(config)
    output = find(config.output_dir, "output_dir")
    if output.is_file():
        raise UserError(f"output_dir is {config.output_dir!r}, which is a file; expected a folder, or none yet")
    layout = make_layout(config)
    check_shared(output, "output_dir")
    exported = output / "exit_branch" / branch_folder.INFO_NAME
    if exported.exists():
        return _finished(config, output, exported)
    for dataset in data.paths_of(config.data, os.fspath(output / "dataset")):
        if not find(dataset, "data.path").exists():  # before the model, which can take minutes
            raise UserError(f"dataset {dataset!r}: no such folder; expected what train/self_generate.py writes, or a JSONL file of chats")
    if config.branch.init_from:
        branch_folder.BranchFolder(branch_folder.find_branch(config.branch.init_from))
    dtype = config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return Run(config, output, layout, load_model(config.model, jnp.dtype(dtype), layout.mesh, config.quantize)).train()


def _finished(config: ExperimentConfig, output: epath.Path, exported: epath.Path) -> Result:
    try:
        training = json.loads(exported.read_text())["training"]
        found, result = training["config"], Result(training["steps"], False, training["held_out"])
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{exported} is not of a training run; expected another output_dir, or no such file") from None
    refuse_other(found, comparable(config), str(output))
    return result


class Input(NamedTuple):
    """What a step reads.

    batch, features: placed on their devices; features are None online. iterator: where the data stands behind it, JSON. tokens: how many
    there are in the global batch, padding aside, as far as this process can tell.
    """

    batch: Batch
    features: teacher.Features | None
    iterator: dict[str, Any]
    tokens: int


class _Pending(NamedTuple):
    """A step that runs, or has run: its number, its metrics, and how many tokens it read."""

    step: int
    metrics: step.Metrics
    tokens: int


class Run:
    """One experiment at work. Attributes are set once, in the order in which each needs the ones before."""

    def __init__(self, config: ExperimentConfig, output: epath.Path, layout: Layout, model: LoadedModel):
        self.config, self.output, self.layout = config, output, layout
        self.model_config, self.tokenizer, self.eos_ids = model.config, model.tokenizer, model.eos_ids
        check_against_model(config, model.config)
        self.rows, self.held_out = (data.open_split(config.data, output / "dataset", split, model) for split in ("train", "validation"))
        self.fingerprint = branch_folder.fingerprint(model.params)
        self.step_config = step.StepConfig.of(config, model.config, layout)
        branch = self._new_branch(model)
        given = {"branch.init_fingerprint": branch_folder.fingerprint(branch._asdict())} if config.branch.init_from else {}
        self.initial = step.init_state(self.step_config, branch, train_head=config.branch.train_head)
        self.token_flops = step.position_flops(
            model.config,
            branch.draft_ids.size,
            online=self.step_config.online,
            train_head=config.branch.train_head,
            deep_input=config.branch.deep_input,
            passes=config.loss.passes,
        )
        chip = find_chip(jax.devices()[0].device_kind)
        self.peak_flops = chip.flops * jax.device_count() if chip else None
        dtype = model.params["final_norm"].dtype.name
        # From here on the blocks are stacked; the model's own are gone.
        trunk = teacher.split_trunk(model.config, model.params, config.branch.exit_layer)
        self.frozen = step.Frozen(trunk, branch.head, branch.draft_ids)
        self.identity = comparable(config) | {
            "model.fingerprint": self.fingerprint,
            "model.dtype": dtype,
            "data.fingerprint": self.rows.fingerprint,
            **given,
        }

    def _new_branch(self, model: LoadedModel) -> exit_branch.ExitBranch:
        config = self.config.branch
        if config.init_from:
            branch = branch_folder.load_branch(config.init_from, model.config, model.params, self.layout.mesh).branch
            check_given_branch(self.config, branch)
            return branch
        draft_ids = None
        if config.draft_vocab:
            counts = data.token_counts(self.rows, model.config.vocab_size)
            draft_ids = np.sort(np.argsort(-counts, kind="stable")[: config.draft_vocab])
        branch = exit_branch.init_exit_branch(
            model.config, model.params, config.exit_layer, config.start, draft_ids, deep_input=config.deep_input
        )
        homes = exit_branch.exit_branch_shardings(model.config, branch.draft_ids.size, self.layout.mesh, deep_input=config.deep_input)
        return jax.tree.map(jax.device_put, branch, homes)

    def train(self) -> Result:
        """From the last checkpoint to the exported branch."""
        config, layout = self.config, self.layout
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir {config.output_dir!r} cannot be made ({error.strerror}); expected a folder to write to") from None
        with contextlib.ExitStack() as stack:
            monitor = stack.enter_context(Monitor(self.output, config.steps, writes=jax.process_index() == 0))
            caches = self.fill_caches(monitor) if config.cache.enabled else {}
            checkpoints = stack.enter_context(Checkpoints(self.output / "checkpoints", config.checkpoint.keep, self.identity))
            loader = self.new_loader()
            evaluation = Evaluation(
                *(config, self.step_config, self.frozen, layout, self.held_out),
                *(caches.get("validation"), self.tokenizer, self.eos_ids),
            )
            state, beside = checkpoints.restore(self.initial)
            if beside is not None:
                loader.set_state(beside["iterator"])
            evaluated = beside is not None and beside["evaluated"]
            should_stop = stack.enter_context(watch_for_sigterm())
            monitor.start(int(state.step), evaluated=evaluated)
            state = self._loop(state, evaluated, loader, caches.get("train"), evaluation, checkpoints, monitor, should_stop)
            done = int(state.step)
            if done < config.steps:
                return Result(done, True, {})
            return Result(done, False, self._export(state, evaluation, monitor))

    def _loop(
        self,
        state: step.TrainState,
        evaluated: bool,
        loader: grain.DatasetIterator,
        cache: teacher.FeatureCache | teacher.JoinedCache | None,
        evaluation: Evaluation,
        checkpoints: Checkpoints,
        monitor: Monitor,
        should_stop: Callable[[int], bool],
    ) -> step.TrainState:
        """Trains to the last step, or to the one behind which all processes were asked to end; that state is saved.

        Args:
          evaluated: whether the evaluation that is due behind the step of `state`, if any, was made.
          should_stop: see `watch_for_sigterm`.
        """
        config = self.config
        run_step = self.compile_step()
        done = int(state.step)
        every = config.evaluation.every
        if done and every and done % every == 0 and done < config.steps and not evaluated:
            monitor.evaluation(done, evaluation.measure(state.trained))
        pending: _Pending | None = None
        with contextlib.closing(self.read_ahead(loader, cache, config.steps - done)) as inputs:
            for item in inputs:
                state, metrics = run_step(state, item)
                done += 1
                # The metrics of the step before are waited for while this one runs.
                self._settle(pending, checkpoints, monitor)
                pending = _Pending(done, metrics, item.tokens)
                last, stop = done == config.steps, should_stop(done)
                evaluate = bool(every) and done % every == 0 and not last and not stop
                save = stop or last or done % config.checkpoint.every == 0
                if evaluate or save:
                    self._settle(pending, checkpoints, monitor)  # nothing that is not finite is ever saved
                    pending = None
                if evaluate:
                    monitor.evaluation(done, evaluation.measure(state.trained))
                if save:
                    monitor.flush()  # who goes on from here finds the lines of all steps before
                    checkpoints.save(done, state, {"iterator": item.iterator, "evaluated": evaluate})
                if stop:
                    break
        checkpoints.wait()
        return state

    def new_loader(self) -> grain.DatasetIterator:
        """This process's rows of every batch, from the first one."""
        return data.make_loader(self.rows, self.config.batch_size, self.config.seed, self.layout.share, self.layout.shares)

    def compile_step(self) -> Callable[[step.TrainState, Input], tuple[step.TrainState, step.Metrics]]:
        """The jitted step; it uses up the state that it is given."""
        run_step = step.jit_step(self.initial)
        return lambda state, item: run_step(self.step_config, self.frozen, state, item.batch, item.features)

    def _settle(self, pending: _Pending | None, checkpoints: Checkpoints, monitor: Monitor) -> None:
        """Waits for the metrics of a step, checks and shows them."""
        if pending is None:
            return
        values = {name: float(value) for name, value in jax.device_get(pending.metrics)._asdict().items()}
        wrong = [f"{name} is {values[name]}" for name in ("loss", "grad_norm", "param_norm") if not math.isfinite(values[name])]
        if wrong:
            checkpoints.wait()
            last = f"the last good checkpoint is of step {checkpoints.latest}" if checkpoints.latest else "there is no checkpoint yet"
            raise UserError(
                f"step {pending.step}: {', '.join(wrong)}; {last}; "
                "expected finite numbers: try a lower optimizer.learning_rate or optimizer.clip_norm, with another output_dir"
            )
        monitor.step(pending.step, values, pending.tokens, self.token_flops, self.peak_flops)

    def read_ahead(
        self, loader: grain.DatasetIterator, cache: teacher.FeatureCache | teacher.JoinedCache | None, count: int
    ) -> Iterator[Input]:
        """The next `count` inputs, each read and placed while the step before runs."""

        def read() -> Input:
            batch = next(loader)
            tokens = int(np.count_nonzero(batch.segments)) * self.layout.shares
            features = cache.read(batch.row, batch.tokens.shape[1]) if cache else None
            return Input(*self.layout.place((batch, features)), loader.get_state(), tokens)

        with concurrent.futures.ThreadPoolExecutor(1) as reader:
            upcoming = reader.submit(read) if count else None
            for left in reversed(range(count)):
                item = upcoming.result()
                upcoming = reader.submit(read) if left else None
                yield item

    def fill_caches(self, monitor: Monitor) -> dict[str, teacher.FeatureCache | teacher.JoinedCache]:
        """The features of both splits, from disk as far as they are there."""
        config = self.config
        folder = pathlib.Path(config.cache.path or os.fspath(self.output / "cache")).expanduser()
        length = config.data.sequence_length
        compute = jax.jit(self._features_to_keep)

        def run(batch: Batch) -> teacher.Features:
            return compute(self.frozen.trunk, self.layout.place(batch))

        caches = {}
        for name, rows in (("train", self.rows), ("validation", self.held_out)):
            found = []
            for part in rows.parts:
                # Of several datasets each has a folder of its own, which other experiments on the same text find, too.
                home = folder if len(rows.parts) == 1 else folder / part.fingerprint[:16]
                found.append(self._open_cache(home / name, part))
                if not found[-1].complete:
                    written = self._written_features(part)
                    source = run if written is None else functools.partial(written.of_batch, part)
                    monitor.follow(f"caching {name}", found[-1].fill(part, config.batch_size, source), len(part), found[-1].rows, length)
            caches[name] = found[0] if len(found) == 1 else teacher.JoinedCache(rows.ends, tuple(found))
        return caches

    def _written_features(self, rows: data.Rows) -> FeatureReader | None:
        """Opens what was kept as the target wrote that text, where it is what this experiment needs; else None."""
        found = feature_file.open_features(rows.name)
        keep = Keep(self.config.branch.exit_layer, self.config.cache.top_tokens, self.config.cache.dtype)
        about = feature_file.describe(keep, self.fingerprint, self.model_config.hidden_size, self.identity["model.dtype"])
        return found if found is not None and found.about == about else None

    def _open_cache(self, folder: pathlib.Path, rows: data.Rows) -> teacher.FeatureCache:
        config = self.config
        provenance = {
            "model": self.fingerprint,
            "data": rows.fingerprint,
            "exit_layer": config.branch.exit_layer,
            "dtype": config.cache.dtype,
            "computed_in": self.identity["model.dtype"],
        }
        shape = len(rows), config.data.sequence_length, self.model_config
        return teacher.FeatureCache(folder, provenance, *shape, top=config.cache.top_tokens, last=self._needs_last)

    @property
    def _needs_last(self) -> bool:
        """Whether steps read the target's last hidden states themselves."""
        return bool(self.config.loss.regression) or self.config.branch.deep_input

    def _features_to_keep(self, trunk: teacher.Trunk, batch: Batch) -> teacher.Features:
        config = self.config
        hidden, last = teacher.hidden_states(self.model_config, trunk, batch, last=True, rows_home=self.step_config.rows_home)
        top = teacher.top_tokens(trunk, last, config.cache.top_tokens, config.loss.chunk)
        return teacher.Features(hidden, last if self._needs_last else None, top)

    def _export(self, state: step.TrainState, evaluation: Evaluation, monitor: Monitor) -> dict[str, float]:
        """Evaluates, fits the calibration, and writes the folder that decoding loads; returns what was found on held-out text."""
        held_out = evaluation.measure(state.trained)
        monitor.evaluation(self.config.steps, held_out)
        calibration = evaluation.calibrate(state.trained)
        in_bytes = self.config.branch.save_dtype == "int8"
        branch = step.to_branch(state.trained, self.frozen, jnp.dtype("float32" if in_bytes else self.config.branch.save_dtype))
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
        branch = on_every_host(branch)
        if jax.process_index() == 0:
            monitor.plot()
            export(self.output / "exit_branch", branch, info, in_bytes=in_bytes)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("exported")
        return held_out


def export(folder: epath.Path, branch: exit_branch.ExitBranch, info: branch_folder.BranchInfo, *, in_bytes: bool = False) -> None:
    """Writes the branch's folder, local or in a bucket; `config.json`, which vouches for the rest, comes last."""
    if "://" not in os.fspath(folder):
        branch_folder.save_branch(os.fspath(folder), branch, info, in_bytes=in_bytes)
        return
    with tempfile.TemporaryDirectory() as local:
        branch_folder.save_branch(local, branch, info, in_bytes=in_bytes)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (branch_folder.TENSORS_NAME, branch_folder.INFO_NAME):
            (folder / name).write_bytes((pathlib.Path(local) / name).read_bytes())
