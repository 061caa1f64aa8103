"""An exit branch for Llama-3.1-70B-Instruct, from text that it writes itself.

N = 10 of 80 blocks: about an eighth, as a start. No branch has been trained for this model yet, so N, the
learning rate and the draft vocabulary are starting points.

One host of TPUs or GPUs:

    python train/self_generate.py --config=configs/llama70b.py
    python train/distill.py --config=configs/llama70b.py

A TPU pod, all workers at once (for both commands), with a folder that all of them see:

    RUN=".venv/bin/python train/distill.py --config=configs/llama70b.py --config.output_dir=gs://BUCKET/llama70b"
    gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command="cd eesd-jax; $RUN"

Several TPU slices, a queued resource of several nodes, which are recognised by their chips (mesh.data lies across them):

    gcloud compute tpus queued-resources ssh NAME --zone=ZONE --node=all --worker=all --command="cd eesd-jax; $RUN"

GPUs under SLURM, a task a GPU (for both commands):

    RUN="python train/distill.py --config=configs/llama70b.py --config.mesh.fsdp=8 --config.output_dir=/shared/llama70b"
    srun --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 $RUN

Weights lie over 16 chips (mesh.fsdp); further ones take other rows (mesh.data). On fewer, set --config.mesh.fsdp.

    slice           mesh.data x mesh.fsdp   GiB a chip      a step    hours   chip-hours
    v5p 2x2x4       1 x 16                  23.1 of 95     2686 ms    1.12    17.9
    2 x v5p 2x2x4   2 x 16                  17.5 of 95     1343 ms    0.56    17.9
    v5e 8x8         1 x 64                  12.9 of 16     3129 ms    0.65    41.7
    2 x 8 x H100    2 x 8                   33.3 of 80    *1247 ms    0.52    8.3

v5e 8x8 is with --config.mesh.fsdp=64 --config.batch_size=128 --config.steps=750, the GPUs with --config.mesh.fsdp=8. Least times by
docs/plan.md, for 197 M tokens, from data sheets; * by arithmetic, not compiled. Nothing has been run on a TPU or GPU.
"""

from ml_collections import ConfigDict

from eesd_jax.distill.experiment import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.model = "meta-llama/Llama-3.1-70B-Instruct"
    config.output_dir = "runs/llama70b"
    config.dtype = "bfloat16"
    config.steps = 1500
    config.batch_size = 64
    config.mesh.data = -1
    config.mesh.fsdp = 16
    config.self_generate.prompts = "self"
    config.self_generate.num_responses = 300_000
    config.self_generate.max_prompt_tokens = 512
    config.self_generate.max_new_tokens = 512
    config.data.sequence_length = 2048
    config.branch.exit_layer = 10
    config.branch.start = "next"
    config.branch.draft_vocab = 16384
    config.branch.train_head = True
    config.branch.save_dtype = "bfloat16"
    config.loss.chunk = 1024
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 50
    config.evaluation.every = 125
    config.evaluation.rollouts = 0
    config.checkpoint.every = 75
    return config
