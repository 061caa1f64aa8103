"""An exit branch for the built-in model, SmolLM2-135M-Instruct."""

from ml_collections import ConfigDict

from eesd_jax.experiment import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.model = "demo"
    config.output_dir = "runs/smollm135m"
    config.steps = 1500
    config.batch_size = 8
    config.self_generate.prompts = "self"
    config.self_generate.num_responses = 6000
    config.self_generate.max_prompt_tokens = 256
    config.self_generate.max_new_tokens = 192
    config.self_generate.batch_size = 64
    config.data.sequence_length = 512
    config.branch.exit_layer = 4
    config.branch.start = "next"
    config.branch.draft_vocab = 8192
    config.branch.train_head = True
    config.branch.save_dtype = "float16"
    config.loss.chunk = 64
    config.cache.enabled = True
    config.optimizer.learning_rate = 1e-3
    config.evaluation.every = 250
    config.checkpoint.every = 250
    return config
