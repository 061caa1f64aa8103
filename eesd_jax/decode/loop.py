"""Generation as one `lax.while_loop`: prefill, the plain step, and the loop that serves plain and speculative decoding alike.

`decode` runs to the end, or for a bounded number of steps (streaming, stop strings): the same compiled program, called once or many times.

Axes: B rows, P padded prompt, S capacity in tokens, V vocabulary, E ids that end a text.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from eesd_jax.decode.sampling import Sampling, sample
from eesd_jax.decode.state import EOS, LENGTH, RUNNING, DecodeState
from eesd_jax.model import cache as kv
from eesd_jax.model import llama
from eesd_jax.model.config import ModelConfig
from eesd_jax.model.exit_branch import ExitBranch, run_exit_block


def prefill(
    config: ModelConfig,
    params: llama.Params,
    branch: ExitBranch | None,
    prompt_BxP: jax.Array,
    length_B: jax.Array,
    limit_B: jax.Array,
    row_keys_B: jax.Array,
    *,
    exit_layer: int,
    capacity: int,
    chunk: int,
) -> tuple[DecodeState, kv.KVCache | None]:
    """Runs the prompts through the model.

    Args:
      branch: whose keys and values are wanted too, or None.
      prompt_BxP: int32 [B, P], each row padded on the right. P <= chunk, or a multiple of it: longer prompts are run chunk by chunk, so
        that attention never holds P x P scores.
      length_B: int32 [B], tokens of each prompt, at least 1.
      limit_B: int32 [B], prompt length plus budget; at most `capacity`.
      row_keys_B: PRNG keys [B].
      exit_layer: blocks before the exit branch (any number where there is none), static.
      capacity: slots of the caches, static; at least P.

    Returns:
      The state before the first plain step, and the exit block's cache (None without a branch).
    """
    batch, padded = prompt_BxP.shape
    early, late = range(exit_layer), range(exit_layer, config.num_layers)

    def run(tokens_BxT: jax.Array, start_B: jax.Array, cache: kv.KVCache | None) -> tuple[kv.KVCache, kv.KVCache | None, jax.Array]:
        x = llama.embed(params, tokens_BxT)
        h, early_entries = llama.forward_blocks(config, params["blocks"], x, start_B, cache, early)
        x, late_entries = llama.forward_blocks(config, params["blocks"], h, start_B, cache, late)
        exit_entries = None if branch is None else run_exit_block(config, branch, h, start_B, None)[1]
        return kv.KVCache(early_entries.k + late_entries.k, early_entries.v + late_entries.v), exit_entries, x

    if padded <= chunk:
        cache, exit_cache, _ = run(prompt_BxP, jnp.zeros(batch, jnp.int32), None)
        cache = kv.pad(cache, capacity - padded)
        exit_cache = None if exit_cache is None else kv.pad(exit_cache, capacity - padded)
    else:

        def run_chunk(index: jax.Array, caches: tuple[kv.KVCache, kv.KVCache | None]) -> tuple[kv.KVCache, kv.KVCache | None]:
            cache, exit_cache = caches
            start_B = jnp.full(batch, index * chunk, jnp.int32)
            tokens_BxT = jax.lax.dynamic_slice_in_dim(prompt_BxP, index * chunk, chunk, axis=1)
            entries, exit_entries, x = run(tokens_BxT, start_B, cache)
            exit_cache = None if exit_cache is None else kv.write(exit_cache, exit_entries, start_B, after=x)
            return kv.write(cache, entries, start_B, after=x), exit_cache

        # Entries behind a row's own length are garbage, and hidden by its length like everything else there.
        chunks = (jnp.max(length_B) + chunk - 1) // chunk
        dtype = params["embed"].dtype
        exit_cache = None if branch is None else kv.empty(config, batch, capacity, dtype, blocks=1)
        cache, exit_cache = jax.lax.fori_loop(0, chunks, run_chunk, (kv.empty(config, batch, capacity, dtype), exit_cache))
    tokens = jnp.pad(prompt_BxP, ((0, 0), (0, capacity - padded)))
    # Rows that only fill up the batch have no budget. A weak type here would compile the loop again once the host has ended a row.
    finish = jnp.where(length_B < limit_B, RUNNING, LENGTH).astype(jnp.int32)
    return DecodeState(tokens, length_B, limit_B, finish, row_keys_B, cache, None), exit_cache


def plain_step(config: ModelConfig, eos_ids_E: jax.Array, params: llama.Params, sampling: Sampling, state: DecodeState) -> DecodeState:
    """Runs the last committed token of every row through the whole model, and commits one more in the rows that are not finished."""
    batch = state.length.shape[0]
    rows = jnp.arange(batch)
    start_B = state.length - 1
    x = llama.embed(params, state.tokens[rows, start_B][:, None])
    x, new = llama.forward_blocks(config, params["blocks"], x, start_B, state.cache, range(config.num_layers))
    cache = kv.write(state.cache, new, start_B, after=x)
    keys = jax.vmap(jax.random.fold_in)(state.row_keys, state.length)
    token = sample(keys, llama.logits(config, params, x)[:, 0], sampling).token

    running = state.finish == RUNNING
    # A finished row keeps its length: it computes the same thing again, into the same slot, and commits nothing.
    tokens = state.tokens.at[rows, state.length].set(jnp.where(running, token, state.tokens[rows, state.length]))
    length = state.length + running
    finish = jnp.where(jnp.isin(token, eos_ids_E), EOS, jnp.where(length >= state.limit, LENGTH, RUNNING))
    return state._replace(tokens=tokens, length=length, finish=jnp.where(running, finish, state.finish), cache=cache)


def decode(step: Callable[[DecodeState], DecodeState], state: DecodeState, max_steps: jax.Array) -> DecodeState:
    """Steps until every row is finished, or `max_steps` (int32, traced) are done."""

    def unfinished(carry: tuple[DecodeState, jax.Array]) -> jax.Array:
        state, steps = carry
        someone_runs = jnp.any(state.finish == RUNNING)
        may_go_on = steps < max_steps
        return someone_runs & may_go_on

    def body(carry: tuple[DecodeState, jax.Array]) -> tuple[DecodeState, jax.Array]:
        state, steps = carry
        return step(state), steps + 1

    return jax.lax.while_loop(unfinished, body, (state, jnp.int32(0)))[0]
