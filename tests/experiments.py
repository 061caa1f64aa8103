"""Small experiments for tests of training: a dataset of random text, and a config that is done in a second once compiled.

config = experiments.make_config(experiments.write_dataset(tmp_path / "dataset"), tmp_path / "run")
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from eesd_jax.config import ExperimentConfig
from eesd_jax.distill import examples
from eesd_jax.weights import tiny
from eesd_jax.weights.branch_folder import config_hash

NUM_TRAIN, NUM_VALIDATION = 40, 11


def write_dataset(folder: pathlib.Path, seed: int = 0, num_train: int = NUM_TRAIN) -> str:
    """Texts of random characters for the model `tiny`, each the response to its first few; the same bytes for the same seed."""
    config, tokenizer = tiny.config(), tiny.tokenizer()
    provenance = {
        "model": tiny.TINY_NAME,
        "vocab_size": config.vocab_size,
        "tokenizer_hash": examples.tokenizer_hash(tokenizer),
        "target_config_hash": config_hash(config),
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
