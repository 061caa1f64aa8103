"""Weights as codes, for the tests of the kernels that multiply by them."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from gguf import GGMLQuantizationType as GGMLType

from eesd_jax.config import DecodeConfig, DraftConfig
from eesd_jax.decode.controllers import Calibration
from eesd_jax.engine.drafter import Drafter
from eesd_jax.engine.engine import Engine
from eesd_jax.model import llama, stored
from eesd_jax.model.exit_branch import init_exit_branch
from eesd_jax.model.stored import Codes
from eesd_jax.weights.load import load_model


def weight_of(kind: str, outputs: int, inputs: int) -> tuple[Codes, jax.Array]:
    """Codes, and the matrix that they stand for."""
    rng = np.random.default_rng(inputs)
    groups = (outputs, inputs // stored.GROUP)
    scale, offset = rng.normal(size=(2, *groups)).astype(np.float32)
    if kind == "nibbles":
        codes = rng.integers(0, 256, (outputs, inputs // 2), np.uint8)
        pairs = codes.reshape(*groups, -1)
        numbers = np.concatenate([pairs & 15, pairs >> 4], axis=-1) * scale[..., None] + offset[..., None]
    else:
        codes, offset = rng.integers(-128, 128, (outputs, inputs), np.int8), None
        numbers = codes.reshape(*groups, -1) * scale[..., None]
    codes = Codes(*(None if array is None else jnp.asarray(array) for array in (codes, scale, offset)))
    return codes, jnp.asarray(numbers.reshape(outputs, inputs), jnp.float32)


def engines(folder: pathlib.Path, **settings: int) -> tuple[Engine, Engine]:
    """A tiny model of a file of 4-bit codes with an exit branch in 8 bits: reading the codes, and reading the float32 weights."""
    file = tiny.write_gguf(folder / "model.gguf", tiny.hf_config(**settings), matrix_type=GGMLType.Q4_1)
    model = load_model(str(file), jnp.dtype("float32"))
    branch = init_exit_branch(model.config, model.params, 1, "next")
    branch = jax.tree.map(lambda leaf: stored.numbers(stored.rounded(leaf)) if leaf.ndim == 2 else leaf, branch)
    drafter = Drafter(branch, DraftConfig(1, max_draft=3), Calibration(), trained=True)
    models = (model, model._replace(params=stored.dense(model.params)))
    coded, dense = (Engine(some, DecodeConfig(max_new_tokens=24), drafter) for some in models)
    dense.branch = branch
    return coded, dense


def check_texts_are_the_same(coded: Engine, dense: Engine, controller: str | None) -> None:
    """Whether two engines give the same greedy texts."""
    prompts = [[5, 9, 2], [7, 7, 8, 30, 4]]
    first, second = (
        [text.token_ids for text in engine.generate_ids(prompts, seeds=[0, 1], controller=controller)] for engine in (coded, dense)
    )
    assert first == second


def program(engine: Engine, rows: int) -> str:
    """A pass of so many rows through all blocks and the head, in XLA's language."""
    x = jnp.ones((1, rows, engine.model.config.hidden_size))

    def run(params: llama.Params, x: jax.Array) -> jax.Array:
        blocks = range(engine.model.config.num_layers)
        x, _ = llama.forward_blocks(engine.model.config, params["blocks"], x, jnp.zeros(1, jnp.int32), None, blocks)
        return llama.logits(engine.model.config, params, x)

    return jax.jit(run).lower(engine.params, x).as_text()
