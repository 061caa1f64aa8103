"""Generation as one `lax.while_loop`: prefill, the plain step, and the loop that serves plain and speculative decoding alike.

`decode` runs to the end, or for a bounded number of steps (streaming, stop strings): the same compiled program, called once or many times.

Axes: B rows, P padded prompt, S capacity in tokens, D hidden, V vocabulary, E ids that end a text.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from eesd_jax.decode.sampling import Sampling, sample
from eesd_jax.decode.state import EOS, LENGTH, RUNNING, DecodeState, ExitState
from eesd_jax.model import cache as kv
from eesd_jax.model import llama
from eesd_jax.model.config import ModelConfig
from eesd_jax.model.exit_branch import ExitBranch, before, fuse, run_exit_block

Decoding = TypeVar("Decoding")  # what `decode` carries: it has the field `finish` of a `DecodeState`


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


class _Blocks(NamedTuple):
    """All blocks run on some tokens: their new keys and values, and [B, T, D] after block N (`hidden`) and after the last block (`x`)."""

    entries: kv.KVCache
    hidden: jax.Array
    x: jax.Array


class Seen(NamedTuple):
    """What a pass finds besides tokens, [B, T, D] each in the model's dtype. hidden: after block N. last: after the final norm."""

    hidden: jax.Array
    last: jax.Array


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
    return _begin(prompts, limit_B, row_keys_B, cache), exits


def prefill_seen(
    config: ModelConfig,
    params: llama.Params,
    prompt_BxP: jax.Array,
    length_B: jax.Array,
    limit_B: jax.Array,
    row_keys_B: jax.Array,
    *,
    exit_layer: int,
    capacity: int,
) -> tuple[DecodeState, Seen]:
    """Runs the prompts through the model in one pass, for plain decoding, and returns what the pass found, too.

    Args:
      exit_layer: blocks before what is seen (`Seen.hidden`), static.
      others: see `prefill`.

    Returns:
      The state before the first plain step, and what was seen at every token of the prompts, T = P.
    """
    prompts = _Prompts(config=config, params=params, branch=None, exit_layer=exit_layer, tokens=prompt_BxP, length=length_B)
    ran = _run_blocks(config, params, prompt_BxP, jnp.zeros_like(length_B), None, exit_layer)
    cache = kv.pad(ran.entries, capacity - prompt_BxP.shape[1])
    return _begin(prompts, limit_B, row_keys_B, cache), _seen(config, params, ran)


def _begin(prompts: _Prompts, limit_B: jax.Array, row_keys_B: jax.Array, cache: kv.KVCache) -> DecodeState:
    """Makes the state before the first plain step, of prompts whose keys and values are in the cache."""
    capacity, padded = cache.v[0].shape[2], prompts.tokens.shape[1]
    # Rows that only fill up the batch have no budget. A weak type here would compile the loop again once the host has ended a row.
    finish = jnp.where(prompts.length < limit_B, RUNNING, LENGTH).astype(jnp.int32)
    return DecodeState(
        tokens=jnp.pad(prompts.tokens, ((0, 0), (0, capacity - padded))),
        length=prompts.length,
        limit=limit_B,
        finish=finish,
        row_keys=row_keys_B,
        cache=cache,
        draft=None,
    )


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
    entries, h, x = _run_blocks(config, params, tokens_BxT, start_B, cache, prompts.exit_layer)
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


def _run_blocks(
    config: ModelConfig, params: llama.Params, tokens_BxT: jax.Array, start_B: jax.Array, cache: kv.KVCache | None, exit_layer: int
) -> _Blocks:
    """Runs tokens through all blocks, and keeps the residual stream after the first `exit_layer` of them."""
    early, late = range(exit_layer), range(exit_layer, config.num_layers)
    x = llama.embed(params, tokens_BxT)
    hidden, early_entries = llama.forward_blocks(config, params["blocks"], x, start_B, cache, early)
    x, late_entries = llama.forward_blocks(config, params["blocks"], hidden, start_B, cache, late)
    entries = kv.KVCache(k=early_entries.k + late_entries.k, v=early_entries.v + late_entries.v)
    return _Blocks(entries=entries, hidden=hidden, x=x)


def _seen(config: ModelConfig, params: llama.Params, ran: _Blocks) -> Seen:
    """Norms the last hidden states of a pass."""
    return Seen(hidden=ran.hidden, last=llama.last_hidden(config, params, ran.x))


def plain_step(config: ModelConfig, eos_ids_E: jax.Array, params: llama.Params, sampling: Sampling, state: DecodeState) -> DecodeState:
    """Runs the last committed token of every row through the whole model, and commits one more in the rows that are not finished."""
    return seen_step(config, config.num_layers, eos_ids_E, params, sampling, state)[0]


def seen_step(
    config: ModelConfig, exit_layer: int, eos_ids_E: jax.Array, params: llama.Params, sampling: Sampling, state: DecodeState
) -> tuple[DecodeState, Seen, jax.Array]:
    """Takes a `plain_step`, and returns what its pass found at the token that it ran, too: `Seen`, T = 1, and logits, float32 [B, V]."""
    batch = state.length.shape[0]
    rows = jnp.arange(batch)
    start_B = state.length - 1
    ran = _run_blocks(config, params, state.tokens[rows, start_B][:, None], start_B, state.cache, exit_layer)
    cache = kv.write(state.cache, ran.entries, start_B, after=ran.x)
    keys = jax.vmap(jax.random.fold_in)(state.row_keys, state.length)
    logits_BxV = llama.logits(config, params, ran.x)[:, 0]
    token = sample(keys, logits_BxV, sampling).token

    running = state.finish == RUNNING
    # A finished row keeps its length: it computes the same thing again, into the same slot, and commits nothing.
    tokens = state.tokens.at[rows, state.length].set(jnp.where(running, token, state.tokens[rows, state.length]))
    length = state.length + running
    finish = jnp.where(jnp.isin(token, eos_ids_E), EOS, jnp.where(length >= state.limit, LENGTH, RUNNING))
    state = state._replace(tokens=tokens, length=length, finish=jnp.where(running, finish, state.finish), cache=cache)
    return state, _seen(config, params, ran), logits_BxV


def decode(step: Callable[[Decoding], Decoding], state: Decoding, max_steps: jax.Array) -> Decoding:
    """Steps until every row is finished, or `max_steps` (int32, traced) are done."""

    def unfinished(carry: tuple[Decoding, jax.Array]) -> jax.Array:
        state, steps = carry
        someone_runs = jnp.any(state.finish == RUNNING)
        may_go_on = steps < max_steps
        return someone_runs & may_go_on

    def body(carry: tuple[Decoding, jax.Array]) -> tuple[Decoding, jax.Array]:
        state, steps = carry
        return step(state), steps + 1

    return jax.lax.while_loop(unfinished, body, (state, jnp.int32(0)))[0]
