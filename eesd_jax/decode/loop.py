"""Generation as one `lax.while_loop` over a state that is all arrays: prefill, the plain step, and the loop that serves both at once.

`decode` runs to the end, or for a bounded number of steps (streaming, stop strings): the same compiled program, called once or many times.

Invariant: the cache holds keys and values of exactly the first `length - 1` committed tokens of each row. The last committed token is run
by the next step, so every token, the first included, comes out of a step.

Axes: B rows, P padded prompt, S capacity in tokens, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from eesd_jax.config import ModelConfig
from eesd_jax.decode.sampling import Sampling, sample
from eesd_jax.model import cache as kv
from eesd_jax.model import llama

RUNNING, EOS, LENGTH, STOPPED = range(4)


class DecodeState(NamedTuple):
    """Everything that generation carries from step to step.

    tokens: int32 [B, S], committed tokens, prompt first; what lies behind `length` is meaningless.
    length: int32 [B], committed tokens of each row.
    limit: int32 [B], the length at which a row's budget is used up.
    finish: int32 [B], RUNNING, or why the row ended: EOS, LENGTH, or STOPPED from outside.
    row_keys: PRNG keys [B]; the token at position i is drawn with `fold_in(row_key, i)`, so a row's samples depend on nothing but the row.
    cache: keys and values, capacity S.
    """

    tokens: jax.Array
    length: jax.Array
    limit: jax.Array
    finish: jax.Array
    row_keys: jax.Array
    cache: kv.KVCache


def prefill(
    config: ModelConfig,
    params: llama.Params,
    prompt_BxP: jax.Array,
    length_B: jax.Array,
    limit_B: jax.Array,
    row_keys_B: jax.Array,
    *,
    capacity: int,
    chunk: int,
) -> DecodeState:
    """Runs the prompts through the model and returns the state before the first step.

    Args:
      prompt_BxP: int32 [B, P], each row padded on the right. P <= chunk, or a multiple of it: longer prompts are run chunk by chunk, so
        that attention never holds P x P scores.
      length_B: int32 [B], tokens of each prompt, at least 1.
      limit_B: int32 [B], prompt length plus budget; at most `capacity`.
      row_keys_B: PRNG keys [B].
      capacity: slots of the cache, static; at least P.
    """
    batch, padded = prompt_BxP.shape
    if padded <= chunk:
        x = llama.embed(params, prompt_BxP)
        _, new = llama.forward_blocks(config, params["blocks"], x, jnp.zeros(batch, jnp.int32), None, range(config.num_layers))
        pad = capacity - padded
        cache = kv.KVCache(
            tuple(jnp.pad(k, ((0, 0), (0, 0), (0, 0), (0, pad))) for k in new.k),
            tuple(jnp.pad(v, ((0, 0), (0, 0), (0, pad), (0, 0))) for v in new.v),
        )
    else:

        def run_chunk(index: jax.Array, cache: kv.KVCache) -> kv.KVCache:
            start_B = jnp.full(batch, index * chunk, jnp.int32)
            x = llama.embed(params, jax.lax.dynamic_slice_in_dim(prompt_BxP, index * chunk, chunk, axis=1))
            _, new = llama.forward_blocks(config, params["blocks"], x, start_B, cache, range(config.num_layers))
            return kv.write(cache, new, start_B)

        # Entries behind a row's own length are garbage, and hidden by its length like everything else there.
        chunks = (jnp.max(length_B) + chunk - 1) // chunk
        cache = jax.lax.fori_loop(0, chunks, run_chunk, kv.empty(config, batch, capacity, params["embed"].dtype))
    tokens = jnp.pad(prompt_BxP, ((0, 0), (0, capacity - padded)))
    finish = jnp.where(length_B < limit_B, RUNNING, LENGTH)  # rows that only fill up the batch have no budget
    return DecodeState(tokens, length_B, limit_B, finish, row_keys_B, cache)


def plain_step(config: ModelConfig, eos_ids: tuple[int, ...], params: llama.Params, sampling: Sampling, state: DecodeState) -> DecodeState:
    """Runs the last committed token of every row through the whole model, and commits one more in the rows that are not finished."""
    batch = state.length.shape[0]
    rows = jnp.arange(batch)
    start_B = state.length - 1
    x = llama.embed(params, state.tokens[rows, start_B][:, None])
    x, new = llama.forward_blocks(config, params["blocks"], x, start_B, state.cache, range(config.num_layers))
    cache = kv.write(state.cache, new, start_B)
    keys = jax.vmap(jax.random.fold_in)(state.row_keys, state.length)
    token = sample(keys, llama.logits(config, params, x)[:, 0], sampling).token

    running = state.finish == RUNNING
    # A finished row keeps its length: it computes the same thing again, into the same slot, and commits nothing.
    tokens = state.tokens.at[rows, state.length].set(jnp.where(running, token, state.tokens[rows, state.length]))
    length = state.length + running
    finish = jnp.where(jnp.isin(token, jnp.array(eos_ids, jnp.int32)), EOS, jnp.where(length >= state.limit, LENGTH, RUNNING))
    return state._replace(tokens=tokens, length=length, finish=jnp.where(running, finish, state.finish), cache=cache)


def decode(
    config: ModelConfig,
    eos_ids: tuple[int, ...],
    params: llama.Params,
    sampling: Sampling,
    state: DecodeState,
    max_steps: jax.Array,
) -> DecodeState:
    """Steps until every row is finished, or `max_steps` (int32, traced) are done."""

    def unfinished(carry: tuple[DecodeState, jax.Array]) -> jax.Array:
        state, steps = carry
        someone_runs = jnp.any(state.finish == RUNNING)
        may_go_on = steps < max_steps
        return someone_runs & may_go_on

    def body(carry: tuple[DecodeState, jax.Array]) -> tuple[DecodeState, jax.Array]:
        state, steps = carry
        return plain_step(config, eos_ids, params, sampling, state), steps + 1

    return jax.lax.while_loop(unfinished, body, (state, jnp.int32(0)))[0]
