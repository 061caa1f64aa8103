"""An exit branch for the built-in model, SmolLM2-135M-Instruct, from text that it writes itself.

    python train/self_generate.py --config=configs/smollm135m.py
    python train/distill.py --config=configs/smollm135m.py

To train on the model's answers to prompts of your own, add --config.self_generate.prompts=FILE.jsonl to the first command.

Cost on 2 cores of an Intel Xeon: generation 226 response tokens/s, caching 550 tokens/s, training 3,500 tokens/s: by these rates about one
and a half hours, one hour, and half an hour. This full run has not been made to the end yet.

A small budget of it, 16 minutes in all, is 300 responses (49,992 tokens) and 150 steps (0.6 M token visits):

    python train/self_generate.py --config=configs/smollm135m.py --config.self_generate.num_responses=300
    python train/distill.py --config=configs/smollm135m.py --config.steps=150 --config.evaluation.every=50

Result on held-out text: loss 5.68 behind step 50, 3.31 behind step 150; agreement 0.17, then 0.33; tokens per round of 4 drafts 1.25, then
1.49, with 31% of first drafts accepted.

A larger one, behind N = 2: 4,000 responses to prompts from a file (547,502 response tokens) and 1,000 steps (2.2 M token visits), which
took 22 minutes beside writing the cache of 1.0 M tokens:

    MORE="--config.branch.exit_layer=2 --config.data.max_examples=4000 --config.steps=1000"
    python train/self_generate.py --config=configs/smollm135m.py --config.self_generate.prompts=questions.jsonl
    python train/distill.py --config=configs/smollm135m.py $MORE

Result on held-out text, behind every 200th step: agreement 0.35, 0.40, 0.42, 0.43, 0.44; tokens per round of 4 drafts 1.65, 1.77, 1.84,
1.85, 1.89, at the end with 45% of first drafts accepted. On other text it is worth less: of greedy answers to the first 16 questions of
MT-bench 25% of first drafts were accepted. There, where the first draft costs 0.23 of a plain step, it alone gives 0.90 of plain decoding's
speed with `cost_aware` and 0.87 with `fixed:1` (1.01 and 0.97 by the measured cost of rounds), and with lookup 1.00 (1.24): so it does not
come with the package.
"""

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
