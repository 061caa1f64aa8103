"""Small experiments for tests of training: a dataset of random text, a config that is done in a second once compiled, and its run.

config = experiments.make_config(experiments.write_dataset(tmp_path / "dataset"), tmp_path / "run")
run = experiments.prepare(config)
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from eesd_jax.config import ExperimentConfig
from eesd_jax.distill import examples, trainer
from eesd_jax.distill.layout import Layout
from eesd_jax.distill.monitor import METRICS_NAME
from eesd_jax.model import exit_branch, sharding
from eesd_jax.weights import branch_folder, tiny
from eesd_jax.weights.load import LoadedModel, load_model

NUM_TRAIN, NUM_VALIDATION = 40, 11


def write_dataset(folder: pathlib.Path, seed: int = 0, num_train: int = NUM_TRAIN) -> str:
    """Texts of random characters for the model `tiny`, each the response to its first few; the same bytes for the same seed."""
    config, tokenizer = tiny.config(), tiny.tokenizer()
    provenance = {
        "model": tiny.TINY_NAME,
        "vocab_size": config.vocab_size,
        "tokenizer_hash": examples.tokenizer_hash(tokenizer),
        "target_config_hash": branch_folder.config_hash(config),
    }
    rng = np.random.default_rng(seed)

    def records(count: int) -> list[dict[str, Any]]:
        lengths = rng.integers(8, 40, count)
        return [
            {
                # Some characters are frequent, as in any text.
                "tokens": np.minimum(3 + rng.geometric(0.03, length), config.vocab_size - 1).astype(np.int32),
                "response": np.arange(length) >= rng.integers(2, 6),
                "index": i,
                "temperature": 0.0,
                "prompt_id": str(i),
            }
            for i, length in enumerate(lengths)
        ]

    examples.write_dataset(folder, {"train": records(num_train), "validation": records(NUM_VALIDATION)}, provenance)
    return str(folder)


def make_config(dataset: str, output: pathlib.Path, **changes: Any) -> ExperimentConfig:
    """Ten steps of the model `tiny`, evaluated and saved behind every fourth."""
    config = ExperimentConfig(model=tiny.TINY_NAME, output_dir=str(output), dtype="", steps=10, batch_size=4)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=dataset, sequence_length=64),
        branch=dataclasses.replace(config.branch, exit_layer=2),
        loss=dataclasses.replace(config.loss, chunk=32),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=3e-3, warmup_steps=2),
        evaluation=dataclasses.replace(config.evaluation, every=4, batches=2, rollouts=0, rollout_tokens=8, rollout_draft=2),
        checkpoint=dataclasses.replace(config.checkpoint, every=4),
    )
    return dataclasses.replace(config, **changes)


def one_device(config: ExperimentConfig | None = None) -> Layout:
    """The first device alone; stands in for `make_layout`."""
    del config
    return Layout(sharding.make_mesh(jax.devices()[:1]), 0, 1)


def prepare(config: ExperimentConfig, layout: Layout | None = None) -> trainer.Run:
    """A run that has loaded everything, but done nothing."""
    layout = layout or one_device()
    model = load_model(config.model, jnp.dtype("float32"), layout.mesh, config.quantize)
    return trainer.Run(config, epath.Path(config.output_dir), layout, model)


def read_metrics(config: ExperimentConfig) -> list[dict[str, Any]]:
    """The lines of a run, without what depends on the clock."""
    lines = (pathlib.Path(config.output_dir) / METRICS_NAME).read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "tokens_per_second"} for line in lines]


def branch_of(config: ExperimentConfig, model: LoadedModel) -> exit_branch.ExitBranch:
    """What a run exported."""
    return branch_folder.load_branch(f"{config.output_dir}/exit_branch", model.config, model.params).branch
