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
    """Returns what a branch carries before the first token."""
    if branch is None:
        return ExitState(None, None)
    deep = None if branch.fusion is None else jnp.zeros((batch, config.hidden_size), dtype)
    return ExitState(kv.empty(config, batch, capacity, dtype, blocks=1), deep)


class _Deep(NamedTuple):
    """Normed last hidden states, [B, D] each or None. last: of the last token that was run. wanted: see `DraftState.deep`."""

    last: jax.Array | None
    wanted: jax.Array | None


class _Run(NamedTuple):
    """Some tokens run: new keys and values of all blocks and of the exit block, the residual stream [B, T, D], and `_Deep` after them."""

    entries: kv.KVCache
    exit_entries: kv.KVCache | None
    x: jax.Array
    deep: _Deep


class _Prompts(NamedTuple):
    """What every pass over prompts reads. exit_layer: N. tokens: int32 [B, P], the prompts. length: int32 [B], of each."""

    config: ModelConfig
    params: llama.Params
    branch: ExitBranch | None
    exit_layer: int
    tokens: jax.Array
    length: jax.Array


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
    padded = prompt_BxP.shape[1]
    # A slice that went over an end would be moved back, and read or write other tokens.
    assert padded <= capacity and (padded <= chunk or padded % chunk == 0), (padded, chunk, capacity)
    prompts = _Prompts(config=config, params=params, branch=branch, exit_layer=exit_layer, tokens=prompt_BxP, length=length_B)
    cache, exits = _run_whole(prompts, capacity) if padded <= chunk else _run_chunks(prompts, capacity, chunk)
    # Rows that only fill up the batch have no budget. A weak type here would compile the loop again once the host has ended a row.
    finish = jnp.where(length_B < limit_B, RUNNING, LENGTH).astype(jnp.int32)
    state = DecodeState(
        tokens=jnp.pad(prompt_BxP, ((0, 0), (0, capacity - padded))),
        length=length_B,
        limit=limit_B,
        finish=finish,
        row_keys=row_keys_B,
        cache=cache,
        draft=None,
    )
    return state, exits


def _run_whole(prompts: _Prompts, capacity: int) -> tuple[kv.KVCache, ExitState]:
    """Runs prompts in one pass: the caches of all blocks and of the exit block."""
    (batch, padded), dtype = prompts.tokens.shape, prompts.params["final_norm"].dtype
    nothing = empty_exits(prompts.config, prompts.branch, batch, capacity, dtype).deep
    run = _run(prompts, prompts.tokens, jnp.zeros(batch, jnp.int32), None, _Deep(last=nothing, wanted=nothing))
    exit_cache = None if run.exit_entries is None else kv.pad(run.exit_entries, capacity - padded)
    return kv.pad(run.entries, capacity - padded), ExitState(exit_cache=exit_cache, deep=run.deep.wanted)


def _run_chunks(prompts: _Prompts, capacity: int, chunk: int) -> tuple[kv.KVCache, ExitState]:
    """Runs prompts chunk by chunk: the caches of all blocks and of the exit block."""
    batch, dtype = prompts.tokens.shape[0], prompts.params["final_norm"].dtype
    exits = empty_exits(prompts.config, prompts.branch, batch, capacity, dtype)

    def run_chunk(index: jax.Array, carry: tuple[kv.KVCache, kv.KVCache | None, _Deep]) -> tuple[kv.KVCache, kv.KVCache | None, _Deep]:
        cache, exit_cache, deep = carry
        start_B = jnp.full(batch, index * chunk, jnp.int32)
        tokens_BxT = jax.lax.dynamic_slice_in_dim(prompts.tokens, index * chunk, chunk, axis=1)
        run = _run(prompts, tokens_BxT, start_B, cache, deep)
        exit_cache = None if exit_cache is None else kv.write(exit_cache, run.exit_entries, start_B, after=run.x)
        return kv.write(cache, run.entries, start_B, after=run.x), exit_cache, run.deep

    # Entries after a row's own length are garbage, and hidden by its length like everything else there.
    chunks = (jnp.max(prompts.length) + chunk - 1) // chunk
    carry = (kv.empty(prompts.config, batch, capacity, dtype), exits.exit_cache, _Deep(last=exits.deep, wanted=exits.deep))
    cache, exit_cache, deep = jax.lax.fori_loop(0, chunks, run_chunk, carry)
    return cache, ExitState(exit_cache=exit_cache, deep=deep.wanted)


def _run(prompts: _Prompts, tokens_BxT: jax.Array, start_B: jax.Array, cache: kv.KVCache | None, deep: _Deep) -> _Run:
    """Runs some tokens of the prompts, each row's from `start_B` on, through all blocks, and through the exit block for its entries."""
    config, params, branch = prompts.config, prompts.params, prompts.branch
    early, late = range(prompts.exit_layer), range(prompts.exit_layer, config.num_layers)
    x = llama.embed(params, tokens_BxT)
    h, early_entries = llama.forward_blocks(config, params["blocks"], x, start_B, cache, early)
    x, late_entries = llama.forward_blocks(config, params["blocks"], h, start_B, cache, late)
    entries = kv.KVCache(k=early_entries.k + late_entries.k, v=early_entries.v + late_entries.v)
    if branch is None:
        return _Run(entries=entries, exit_entries=None, x=x, deep=deep)
    deep_BxTxD = None
    if deep.last is not None:
        own = llama.last_hidden(config, params, x)
        deep_BxTxD = before(deep.last, own)
        # A prompt of one token has none before it, which is as `before` the first.
        place_B = prompts.length - 1 - start_B
        here = (place_B >= 0) & (place_B < tokens_BxT.shape[1])
        found = jnp.take_along_axis(deep_BxTxD, jnp.clip(place_B, 0, tokens_BxT.shape[1] - 1)[:, None, None], axis=1)[:, 0]
        deep = _Deep(last=own[:, -1], wanted=jnp.where(here[:, None], found, deep.wanted))
    exit_entries = run_exit_block(config, branch, fuse(config, branch, h, deep_BxTxD), start_B, None)[1]
    return _Run(entries=entries, exit_entries=exit_entries, x=x, deep=deep)


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
