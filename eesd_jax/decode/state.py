"""What generation carries from step to step: pytrees of arrays, the same for plain and for speculative decoding.

Invariant: the caches hold keys and values of exactly the first `length - 1` committed tokens of each row, in every block and in the exit
block. The last committed token is run by the next step, so every token, the first included, comes out of a step.

Axes: B rows, S capacity in tokens, R = S rounds, D hidden.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eesd_jax.model.cache import KVCache

RUNNING, EOS, LENGTH, STOPPED = range(4)


class RoundLog(NamedTuple):
    """What every round did, from which all statistics are computed; [B, R] each, valid up to `rounds`.

    rounds: int32 [B]. drafted: int32, tokens drafted. accepted: int32, drafts committed. committed: int32, tokens committed: accepted + 1,
    or accepted where the text ended within the drafts, or accepted + 2 where another candidate stood in for a refused draft. alpha, beta:
    float32, the controller's posterior of the acceptance of a draft before the round, NaN where it has none. looked_up: bool, whether the
    drafts came from lookup.
    """

    rounds: jax.Array
    drafted: jax.Array
    accepted: jax.Array
    committed: jax.Array
    alpha: jax.Array
    beta: jax.Array
    looked_up: jax.Array


class ExitState(NamedTuple):
    """What prefill gives to drafting: see `DraftState`; None each without a branch that needs it."""

    exit_cache: KVCache | None
    deep: jax.Array | None


class DraftState(NamedTuple):
    """What speculation carries beside the plain state.

    exit_cache: keys and values of the exit block (a tuple of one), capacity S; None without a branch.
    deep: [B, D], the target's normed last hidden state of the last committed token but one; None where no branch has it as an input.
    probs: float32 [B, K, Q], see `accept.Drafts`. Nothing is read that its own round has not written: it is here so that no round has to
      clear it, which in a batch of 16 took as long as a hundredth of the target's pass.
    controller: the controller's own state, leading axis B.
    log: of all rounds so far.
    """

    exit_cache: KVCache | None
    deep: jax.Array | None
    probs: jax.Array
    controller: Any
    log: RoundLog


class DecodeState(NamedTuple):
    """Everything that generation carries.

    tokens: int32 [B, S], committed tokens, prompt first; what lies behind `length` is meaningless.
    length: int32 [B], committed tokens of each row.
    limit: int32 [B], the length at which a row's budget is used up.
    finish: int32 [B], RUNNING, or why the row ended: EOS, LENGTH, or STOPPED from outside.
    row_keys: PRNG keys [B]; what the target draws for a place of the text comes from
      `fold_in(row_key, place)`; what a round draws beside that from keys of the row and the round.
    cache: keys and values of the target's blocks, capacity S.
    draft: what speculation adds; None in plain decoding.
    """

    tokens: jax.Array
    length: jax.Array
    limit: jax.Array
    finish: jax.Array
    row_keys: jax.Array
    cache: KVCache
    draft: DraftState | None


def empty_log(batch: int, capacity: int) -> RoundLog:
    """A log of no rounds. A round commits at least one token, so there are never more than `capacity`."""

    def empty(dtype: jnp.dtype) -> jax.Array:  # an array of its own each: the loop is given its memory
        return jnp.zeros((batch, capacity), dtype)

    return RoundLog(
        rounds=jnp.zeros(batch, jnp.int32),
        drafted=empty(jnp.int32),
        accepted=empty(jnp.int32),
        committed=empty(jnp.int32),
        alpha=empty(jnp.float32),
        beta=empty(jnp.float32),
        looked_up=empty(bool),
    )
