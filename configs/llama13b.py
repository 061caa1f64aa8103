"""An exit branch for Llama-2-13b-chat, from text that it writes itself.

N = 5 of 40 blocks: about an eighth, as a start. No branch has been trained for this model yet, so N, the
learning rate and the draft vocabulary are starting points.

One host of TPUs or GPUs:

    python train/self_generate.py --config=configs/llama13b.py
    python train/distill.py --config=configs/llama13b.py

A TPU pod, all workers at once (for both commands), with a folder that all of them see:

    RUN=".venv/bin/python train/distill.py --config=configs/llama13b.py --config.output_dir=gs://BUCKET/llama13b"
    gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command="cd eesd-jax; $RUN"

Several TPU slices, a queued resource of several nodes, which are recognised by their chips (mesh.data lies across them):

    gcloud compute tpus queued-resources ssh NAME --zone=ZONE --node=all --worker=all --command="cd eesd-jax; $RUN"

GPUs under SLURM, a task a GPU (for both commands):

    RUN="python train/distill.py --config=configs/llama13b.py --config.output_dir=/shared/llama13b"
    srun --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 $RUN

Weights lie over 4 chips (mesh.fsdp); further ones take other rows (mesh.data). On fewer, set --config.mesh.fsdp. With 32 rows gathering
weights takes less time than the arithmetic on each of these (v6e waits for its memory):

    slice       mesh.data x mesh.fsdp   GiB a chip      a step    hours   chip-hours
    v5e 4x4     4 x 4                   12.0 of 16      617 ms    0.51    8.2
    v6e 2x4     2 x 4                   14.8 of 32      348 ms    0.29    2.3
    v5p 2x2x1   1 x 4                   21.8 of 95     1059 ms    0.88    3.5
    8 x H100    2 x 4                   15.3 of 80     *246 ms    0.20    1.6

Least times by docs/plan.md, for 197 M tokens, from data sheets; * by arithmetic, not compiled. Nothing has been run on a TPU or GPU.
"""

from ml_collections import ConfigDict

from eesd_jax.distill.experiment import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.model = "meta-llama/Llama-2-13b-chat-hf"
    config.output_dir = "runs/llama13b"
    config.dtype = "bfloat16"
    config.steps = 3000
    config.batch_size = 32
    config.mesh.data = -1
    config.mesh.fsdp = 4
    config.self_generate.prompts = "self"
    config.self_generate.num_responses = 300_000
    config.self_generate.max_prompt_tokens = 512
    config.self_generate.max_new_tokens = 512
    config.data.sequence_length = 2048
    config.branch.exit_layer = 5
    config.branch.start = "next"
    config.branch.draft_vocab = 8192
    config.branch.train_head = True
    config.branch.save_dtype = "bfloat16"
    config.loss.chunk = 512
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 100
    config.evaluation.every = 250
    config.evaluation.rollouts = 0
    config.checkpoint.every = 125
    return config
