"""What comes out of training: a branch that learnt and decodes, its calibration, metrics, and a target that is as it was."""

import dataclasses
import gc
import json
import struct
from collections.abc import Iterator
from typing import NamedTuple

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments import NUM_VALIDATION, branch_of, make_config, prepare, read_metrics, write_dataset
from tensorboardX.proto import event_pb2

from eesd_jax import DecodeConfig, Engine
from eesd_jax.config import DraftConfig
from eesd_jax.decode.controllers import Calibration, Fixed
from eesd_jax.distill import evaluation, teacher, trainer
from eesd_jax.distill.checks import comparable
from eesd_jax.engine.drafter import Drafter
from eesd_jax.model import exit_branch
from eesd_jax.weights import branch_folder
from eesd_jax.weights.load import LoadedModel, load_model


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


class Finished(NamedTuple):
    """A run that was watched. alive: bytes of all arrays behind each evaluation. programs: how often each was compiled."""

    run: trainer.Run
    result: trainer.Result
    model: LoadedModel
    alive: list[int]
    programs: dict[str, int]


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory) -> Finished:
    """Five evaluations, with rollouts; 40 tokens to draft, a result in bfloat16, and no checkpoint before the last, as it is a copy."""
    config = make_config(dataset, tmp_path_factory.mktemp("finished"))
    config = dataclasses.replace(
        config,
        branch=dataclasses.replace(config.branch, draft_vocab=40, save_dtype="bfloat16"),
        evaluation=dataclasses.replace(config.evaluation, every=2, rollouts=2),
        checkpoint=dataclasses.replace(config.checkpoint, every=100),
    )
    measure, alive = evaluation.Evaluation.measure, []

    def watched(self, trained):
        values = measure(self, trained)
        alive.append(sum(array.nbytes for array in jax.live_arrays()))
        return values

    run = prepare(config)
    gc.collect()
    gc.disable()  # what is not needed is to go at once, without a search for it
    try:
        with pytest.MonkeyPatch.context() as patch, compiled.programs() as counts:
            patch.setattr(evaluation.Evaluation, "measure", watched)
            result = run.train()
    finally:
        gc.enable()
    return Finished(run, result, load_model(config.model, jnp.dtype("float32"), run.layout.mesh), alive, dict(counts))


def test_only_the_branch_learns(finished):
    """To the bit: behind all steps, evaluations and the export, the target is what was loaded."""
    run, model = finished.run, finished.model
    jax.tree.map(np.testing.assert_array_equal, teacher.join_trunk(model.config, run.frozen.trunk), model.params)
    started = exit_branch.init_exit_branch(model.config, model.params, 2, run.config.branch.start, np.asarray(run.frozen.draft_ids))
    np.testing.assert_array_equal(run.frozen.head, started.head)
    learnt = branch_of(run.config, model)
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b.astype(jnp.bfloat16).astype(b.dtype)), learnt, started)
    assert all(changed.block.values())
    assert (changed.norm, changed.head, changed.draft_ids) == (True, False, False)


def test_evaluations_compile_once_and_leave_no_copy_of_the_target(finished):
    programs = ("train_step", "evaluate", "prefill", "_decode_speculative")
    assert {name: finished.programs[name] for name in programs} == dict.fromkeys(programs, 1)
    assert len(finished.alive) == finished.run.config.steps // 2
    trunk = sum(leaf.nbytes for leaf in jax.tree.leaves(finished.model.params))
    assert max(finished.alive) - min(finished.alive) < trunk / 2


def test_rollouts_are_of_the_real_decoder(finished):
    metrics = finished.result.metrics
    assert 1 <= metrics["tokens_per_round"] <= finished.run.config.evaluation.rollout_draft + 1
    assert [name for name in metrics if name.startswith("acceptance")] == ["acceptance_1", "acceptance_2"]
    assert all(0 <= metrics[name] <= 1 for name in ("agreement", "overlap", "coverage", "acceptance_1", "acceptance_2"))


def test_the_exported_branch_loads_and_greedy_text_is_that_of_plain_decoding(finished):
    config, model = finished.run.config, finished.model
    mesh = finished.run.layout.mesh
    loaded, info = branch_folder.load_branch(f"{config.output_dir}/exit_branch", model.config, model.params, mesh)
    assert loaded.draft_ids.size == 40
    assert info.training["held_out"] == finished.result.metrics
    assert info.training["config"] == json.loads(json.dumps(comparable(config)))
    assert np.isfinite([info.calibration_slope, info.calibration_intercept]).all()
    assert (info.calibration_slope, info.calibration_intercept) != (1.0, 0.0)
    draft = DraftConfig(config.branch.exit_layer, max_draft=2, verify_widths=())
    engine = Engine(model, DecodeConfig(), Drafter(loaded, draft, Calibration(), trained=True))
    options = {"prompts": [[5, 9, 30], [60, 61, 62, 63]], "seeds": [0, 0], "max_new_tokens": 40}
    plain, drafted = (engine.generate_ids(**options, controller=controller) for controller in (None, Fixed(2)))
    assert [one.token_ids for one in drafted] == [one.token_ids for one in plain]
    assert sum(one.log.accepted.sum() for one in drafted) > 0


def read_events(records: bytes) -> Iterator[event_pb2.Event]:
    """TFRecords: a length, its checksum, an event, its checksum."""
    while records:
        (length,) = struct.unpack("<Q", records[:8])
        event = event_pb2.Event()
        event.ParseFromString(records[12 : 12 + length])
        yield event
        records = records[16 + length :]


def test_what_a_run_shows_can_be_read(finished):
    """A line a step and an evaluation, the same as TensorBoard events, and a picture."""
    output, config = finished.run.output, finished.run.config
    lines = read_metrics(config)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, config.steps + 1))
    (last,) = [line for line in lines if line["step"] == config.steps and "loss" not in line]
    wanted = {f"held_out/{name}": value for name, value in finished.result.metrics.items()}
    assert last == pytest.approx({"step": config.steps} | wanted, rel=1e-5)
    found = {}
    for file in (output / "tensorboard").iterdir():
        for event in read_events(file.read_bytes()):
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    for line in lines:
        if line["step"] % 10 == 0 or "loss" not in line:
            for name, value in line.items():
                if name != "step":
                    assert found[name, line["step"]] == pytest.approx(value, rel=1e-4), name
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")


def test_held_out_means_are_over_every_row_once(dataset, tmp_path):
    """Whatever the batches: the last one is filled up, and that does not count."""
    found = []
    for batch_size in (4, 7):
        run = prepare(make_config(dataset, tmp_path, batch_size=batch_size))
        one = evaluation.Evaluation(run.config, run.step_config, run.frozen, run.layout, run.held_out, None, run.tokenizer, run.eos_ids)
        found.append(one.measure(run.initial.trained))
        assert sum(np.sum(batch.loss_mask) for batch, _ in one._batches(100)) == run.held_out.num_response_tokens
    assert len(run.held_out) % 4
    assert len(run.held_out.examples) == NUM_VALIDATION
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (0.6, -0.8), (1.7, 0.5)])
def test_the_calibration_finds_slope_and_intercept(slope, intercept):
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.02, 0.98, 200_000).astype(np.float32)
    accepted = rng.random(confidence.shape) < np.asarray(Calibration(slope, intercept)(jnp.asarray(confidence)))
    found = evaluation.fit_calibration(confidence, accepted)
    assert found.slope == pytest.approx(slope, abs=0.03)
    assert found.intercept == pytest.approx(intercept, abs=0.03)


def test_the_calibration_is_finite_where_the_data_says_little():
    confidence = np.array([0.0, 0.2, 0.9, 1.0], np.float32)
    for accepted in ([True] * 4, [False] * 4):
        assert evaluation.fit_calibration(confidence, np.array(accepted)) == Calibration()
    assert evaluation.fit_calibration(confidence[:0], np.zeros(0, bool)) == Calibration()
    separable = evaluation.fit_calibration(confidence, np.array([False, False, True, True]))
    assert np.isfinite([separable.slope, separable.intercept]).all()
    assert separable.slope > 1
