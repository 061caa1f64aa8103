"""Seconds, on anything: a random model, text that it writes itself, no network, no files.

    python train/self_generate.py --config=configs/tiny.py
    python train/distill.py --config=configs/tiny.py

A random model's text is noise; what can be learned of it is how such a model continues noise.

Cost: 8 s and 19 s on 2 cores of an Intel Xeon, 1,465 response tokens. Result on held-out text: loss 4.24, agreement 0.57, 2.0 tokens per
round of 4 drafts.
"""

from ml_collections import ConfigDict

from eesd_jax.distill.experiment import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.model = "tiny"
    config.output_dir = "runs/tiny"
    config.steps = 60
    config.batch_size = 8
    config.self_generate.prompts = "self"
    config.self_generate.num_responses = 64
    config.self_generate.max_prompt_tokens = 16
    config.self_generate.max_new_tokens = 32
    config.self_generate.validation_share = 0.2
    config.data.sequence_length = 64
    config.branch.exit_layer = 2
    config.loss.chunk = 32
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 10
    config.evaluation.every = 20
    config.evaluation.rollouts = 4
    config.evaluation.rollout_tokens = 16
    config.checkpoint.every = 20
    return config
