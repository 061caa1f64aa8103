"""Measures what quantisation loses: logits with int8 and int4 weights against the unquantised model's, on text that this model wrote.

    python benchmarks/quantisation.py
    python benchmarks/quantisation.py --model=meta-llama/Llama-3.2-1B-Instruct --report=quantisation.md

The unquantised model answers a few prompts greedily. Then each of the three models reads prompts and answers once, and their logits at the
tokens of the answers are compared, in float32. A position's logit error is the root mean square of the differences over the vocabulary,
relative to that of the model's own logits about their mean.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import eesd_jax
from eesd_jax import cli, files
from eesd_jax.bench import report
from eesd_jax.config import NOT_QUANTIZED, QUANTIZATIONS
from eesd_jax.errors import UserError
from eesd_jax.model import llama
from eesd_jax.model.config import ModelConfig
from eesd_jax.planning.counts import bytes_of_a_chip
from eesd_jax.weights.load import LoadedModel

FLAGS = flags.FLAGS
flags.DEFINE_string("model", "demo", "demo (built in), a Hugging Face folder, a GGUF file, or a hub id.")
flags.DEFINE_integer("new_tokens", 128, "Tokens of each answer, at most.")
flags.DEFINE_string("report", None, "File for the table (Markdown).")

PROMPTS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper.",
    "Explain how a bicycle stays upright.",
    "List the steps to bake sourdough bread.",
    "What is the difference between a virus and a bacterium?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "A train travels 180 km in two and a half hours. What is its average speed?",
    "Translate into French: The library opens at nine and closes at six.",
)
_PADDED = 64  # texts are padded to a multiple of so many tokens


class Text(NamedTuple):
    """tokens: int32 [T], prompt and answer. prompt: how many are the prompt's."""

    tokens: np.ndarray
    prompt: int


class Errors(NamedTuple):
    """Errors at every token of the answers, float32 [n]. logits: relative error. kl: of the model as it is to the quantised one, in nats.

    agrees: whether both hold the same token to be the most probable one. nll: of the token that was written, in nats.
    """

    logits: np.ndarray
    kl: np.ndarray
    agrees: np.ndarray
    nll: np.ndarray


def answer(engine: eesd_jax.Engine) -> list[Text]:
    """Generates the model's own greedy answers."""
    texts = []
    for prompt in PROMPTS:
        ids = engine.encode(prompt)
        found = engine.generate_ids([ids], seeds=[0], max_new_tokens=FLAGS.new_tokens, controller=None)[0]
        texts.append(Text(np.array(ids + found.token_ids, np.int32), len(ids)))
    return texts


@functools.partial(jax.jit, static_argnames="config")
def _logits(config: ModelConfig, params: llama.Params, tokens_1xT: jax.Array) -> jax.Array:
    x = llama.embed(params, tokens_1xT)
    x, _ = llama.forward_blocks(config, params["blocks"], x, jnp.zeros(1, jnp.int32), None, range(config.num_layers))
    return llama.logits(config, params, x)[0]


def logits_of(model: LoadedModel, text: Text) -> np.ndarray:
    """Computes the logits of every token of the answer, float32 [n, V]."""
    padded = np.zeros((1, -(-len(text.tokens) // _PADDED) * _PADDED), np.int32)
    padded[0, : len(text.tokens)] = text.tokens
    return np.asarray(_logits(model.config, model.params, padded))[text.prompt - 1 : len(text.tokens) - 1]


def compare(found: np.ndarray, wanted: np.ndarray, written: np.ndarray) -> Errors:
    """Compares logits [n, V] with those of the unquantised model, at the tokens [n] that were written."""

    def log_probs(logits: np.ndarray) -> np.ndarray:
        return np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))

    q, p = log_probs(found), log_probs(wanted)
    centred, difference = wanted - wanted.mean(1, keepdims=True), found - wanted
    return Errors(
        logits=np.sqrt((difference**2).mean(1) / (centred**2).mean(1)),
        kl=(np.exp(p) * (p - q)).sum(1),
        agrees=np.argmax(p, axis=1) == np.argmax(q, axis=1),
        nll=-np.take_along_axis(q, written[:, None], axis=1)[:, 0],
    )


def row(kind: str, model: LoadedModel, errors: Errors) -> tuple[str, ...]:
    """Makes a line of the table."""
    size = sum(map(bytes_of_a_chip, jax.tree.leaves(model.params)))
    return (
        "as it is" if kind == NOT_QUANTIZED else kind,
        f"{size / 1e6:.1f}",
        f"{errors.logits.mean():.4f}",
        f"{errors.logits.max():.4f}",
        f"{errors.kl.mean():.5f}",
        f"{errors.agrees.mean():.2%}",
        f"{np.exp(errors.nll.mean()):.3f}",
    )


def main(argv: Sequence[str]) -> None:
    del argv
    if FLAGS.new_tokens < 1:
        raise UserError(f"--new_tokens is {FLAGS.new_tokens}; expected an integer >= 1")
    texts: list[Text] = []
    wanted: list[np.ndarray] = []
    lines = []
    for kind in QUANTIZATIONS:  # the model as it is comes first
        with cli.notice(f"{kind} ..."):
            engine = eesd_jax.load(FLAGS.model, dtype="float32", exit_branch="none", arms=["lookup"], ngrams="none", quantize=kind)
            texts = texts or answer(engine)
            found = [logits_of(engine.model, text) for text in texts]
            wanted = wanted or found
            written = [text.tokens[text.prompt :] for text in texts]
            errors = Errors(*map(np.concatenate, zip(*map(compare, found, wanted, written), strict=True)))
            lines.append(row(kind, engine.model, errors))
    header = ("weights", "MB", "logit error, mean", "max", "KL, nats, mean", "same best token", "perplexity of the answers")
    table = report.table(header, lines)
    tokens = sum(len(text.tokens) - text.prompt for text in texts)
    summary = f"{FLAGS.model}, float32, {tokens} tokens of {len(texts)} answers\n\n{table}\n"
    print(summary)
    if FLAGS.report:
        with files.whole_file(FLAGS.report) as file:
            file.write(summary)


if __name__ == "__main__":
    cli.run(main)
