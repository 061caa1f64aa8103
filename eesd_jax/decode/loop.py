"""Generation as one `lax.while_loop`: prefill, the plain step, and the loop that serves plain and speculative decoding alike.

`decode` runs to the end, or for a bounded number of steps (streaming, stop strings): the same compiled program, called once or many times.

Axes: B rows, P padded prompt, S capacity in tokens, D hidden, V vocabulary, E ids that end a text.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from eesd_jax.decode.sampling import Sampling, sample
from eesd_jax.decode.state import EOS, LENGTH, RUNNING, DecodeState, ExitState
from eesd_jax.model import cache as kv
from eesd_jax.model import llama
from eesd_jax.model.config import ModelConfig
from eesd_jax.model.exit_branch import ExitBranch, before, fuse, run_exit_block


def empty_exits(config: ModelConfig, branch: ExitBranch | None, batch: int, capacity: int, dtype: jnp.dtype) -> ExitState:
    """What a branch carries before the first token."""
    if branch is None:
        return ExitState(None, None)
    deep = None if branch.fusion is None else jnp.zeros((batch, config.hidden_size), dtype)
    return ExitState(kv.empty(config, batch, capacity, dtype, blocks=1), deep)


class _Deep(NamedTuple):
    """Normed last hidden states, [B, D] each or None. last: of the last token that was run. wanted: see `DraftState.deep`."""

    last: jax.Array | None
    wanted: jax.Array | None


class _Run(NamedTuple):
    """Some tokens run: new keys and values of all blocks and of the exit block, the residual stream [B, T, D], and `_Deep` behind them."""

    entries: kv.KVCache
    exit_entries: kv.KVCache | None
    x: jax.Array
    deep: _Deep


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
) -> tuple[DecodeState, ExitState]:
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
      The state before the first plain step, and what drafting takes from here (see `round.start_drafting`).
    """
    batch, padded = prompt_BxP.shape
    # A slice that went over an end would be moved back, and read or write other tokens.
    assert padded <= capacity and (padded <= chunk or padded % chunk == 0), (padded, chunk, capacity)
    early, late = range(exit_layer), range(exit_layer, config.num_layers)
    dtype = params["final_norm"].dtype
    exit_cache, no_deep = empty_exits(config, branch, batch, capacity, dtype)

    def run(tokens_BxT: jax.Array, start_B: jax.Array, cache: kv.KVCache | None, deep: _Deep) -> _Run:
        x = llama.embed(params, tokens_BxT)
        h, early_entries = llama.forward_blocks(config, params["blocks"], x, start_B, cache, early)
        x, late_entries = llama.forward_blocks(config, params["blocks"], h, start_B, cache, late)
        entries = kv.KVCache(early_entries.k + late_entries.k, early_entries.v + late_entries.v)
        if branch is None:
            return _Run(entries, None, x, deep)
        deep_BxTxD = None
        if no_deep is not None:
            own = llama.last_hidden(config, params, x)
            deep_BxTxD = before(deep.last, own)
            # A prompt of one token has none before it, which is as `before` the first.
            place_B = length_B - 1 - start_B
            here = (place_B >= 0) & (place_B < tokens_BxT.shape[1])
            found = jnp.take_along_axis(deep_BxTxD, jnp.clip(place_B, 0, tokens_BxT.shape[1] - 1)[:, None, None], axis=1)[:, 0]
            deep = _Deep(own[:, -1], jnp.where(here[:, None], found, deep.wanted))
        return _Run(entries, run_exit_block(config, branch, fuse(config, branch, h, deep_BxTxD), start_B, None)[1], x, deep)

    deep = _Deep(no_deep, no_deep)
    if padded <= chunk:
        cache, exit_cache, _, deep = run(prompt_BxP, jnp.zeros(batch, jnp.int32), None, deep)
        cache = kv.pad(cache, capacity - padded)
        exit_cache = None if exit_cache is None else kv.pad(exit_cache, capacity - padded)
    else:

        def run_chunk(index: jax.Array, carry: tuple[kv.KVCache, kv.KVCache | None, _Deep]) -> tuple[kv.KVCache, kv.KVCache | None, _Deep]:
            cache, exit_cache, deep = carry
            start_B = jnp.full(batch, index * chunk, jnp.int32)
            tokens_BxT = jax.lax.dynamic_slice_in_dim(prompt_BxP, index * chunk, chunk, axis=1)
            entries, exit_entries, x, deep = run(tokens_BxT, start_B, cache, deep)
            exit_cache = None if exit_cache is None else kv.write(exit_cache, exit_entries, start_B, after=x)
            return kv.write(cache, entries, start_B, after=x), exit_cache, deep

        # Entries behind a row's own length are garbage, and hidden by its length like everything else there.
        chunks = (jnp.max(length_B) + chunk - 1) // chunk
        carry = (kv.empty(config, batch, capacity, dtype), exit_cache, deep)
        cache, exit_cache, deep = jax.lax.fori_loop(0, chunks, run_chunk, carry)
    tokens = jnp.pad(prompt_BxP, ((0, 0), (0, capacity - padded)))
    # Rows that only fill up the batch have no budget. A weak type here would compile the loop again once the host has ended a row.
    finish = jnp.where(length_B < limit_B, RUNNING, LENGTH).astype(jnp.int32)
    return DecodeState(tokens, length_B, limit_B, finish, row_keys_B, cache, None), ExitState(exit_cache, deep.wanted)


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
