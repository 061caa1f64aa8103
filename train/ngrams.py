"""Counts what the target wrote (train/self_generate.py) into a table of n-grams that lookup drafts from: OUTPUT_DIR/ngrams.safetensors.

python train/ngrams.py --config=configs/X.py
python train/ngrams.py --config=configs/X.py --config.output_dir=runs/mine --entries_log2=20
python infer/generate.py --ngrams=runs/mine/ngrams.safetensors
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from eesd_jax import cli
from eesd_jax.distill import experiment
from eesd_jax.errors import UserError

experiment.define_config_flag()
flags.DEFINE_integer("entries_log2", 19, "The table has two to the power of this many entries of 4 bytes.")
FLAGS = flags.FLAGS


def main(argv: Sequence[str]) -> None:
    del argv
    config = experiment.config_from_flags()
    if not 1 <= FLAGS.entries_log2 <= 28:
        raise UserError(f"--entries_log2 is {FLAGS.entries_log2}; expected an integer from 1 to 28")
    with cli.notice(f"loading {config.model} ..."):
        import numpy as np

        from eesd_jax.decode.sources import ngrams
        from eesd_jax.distill import examples
        from eesd_jax.weights import ngram_file
        from eesd_jax.weights.load import load_text

        model = load_text(config.model)
    if model.config.vocab_size - 1 > ngrams.MAX_TOKEN:
        raise UserError(f"model {config.model!r} has {model.config.vocab_size} tokens; a table can name {ngrams.MAX_TOKEN + 1}")
    path = config.data.path or str(pathlib.Path(config.output_dir) / "dataset")

    def responses(split: str) -> list[list[int]]:
        source = examples.open_source(path, split, model, config.data.validation_share)
        return [example.tokens[example.response].tolist() for example in source.examples]

    texts = responses("train")
    with cli.notice("counting ..."):
        entries = ngrams.build(texts, 2**FLAGS.entries_log2)
    target = pathlib.Path(config.output_dir) / ngram_file.NAME
    tokens = sum(map(len, texts))
    ngram_file.save_ngrams(target, entries, model.config.vocab_size, {"responses": str(len(texts)), "tokens": str(tokens)})
    line = f"{np.count_nonzero(entries)} n-grams of {tokens} tokens in {len(texts)} responses are in {target}"
    if held_out := responses("validation"):
        line += f"; of held-out tokens they foretell {ngrams.foretold(entries, held_out):.3f}"
    print(line)


if __name__ == "__main__":
    cli.run(main)
