"""Acceptance of drafts: which of them the target keeps, and the one token that it adds (Leviathan et al. 2023; Chen et al. 2023).

Exact: float32 throughout, no epsilon. A draft x is accepted where `u * q(x) < p(x)` with u uniform in [0, 1), that is, with probability
min(1, p/q); at the first rejection the token comes from norm(max(p - q, 0)); behind a round without one it comes from p itself.

Axes: B rows, K drafts, W = K + 1 verified positions, Q draft vocabulary, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from eesd_jax.decode.sampling import Sampling, best_token, pick, warp


class Drafts(NamedTuple):
    """What was drafted in a round.

    tokens: int32 [B, K], ids of the target. count: int32 [B], how many of them are this row's.
    chosen: int32 [B, K], the tokens' places in the draft vocabulary. probs: float32 [B, K, Q], the distributions they were drawn from.
    looked_up: bool [B], rows whose drafts were not drawn at all: each is a point mass, and any token of the vocabulary.
    """

    tokens: jax.Array
    count: jax.Array
    chosen: jax.Array
    probs: jax.Array
    looked_up: jax.Array


class Verdict(NamedTuple):
    """accepted: int32 [B], drafts kept. token: int32 [B], the target's own token behind them."""

    accepted: jax.Array
    token: jax.Array


def _leading(accept_BxK: jax.Array) -> jax.Array:
    """How many of the first ones hold, int32 [B]."""
    return jnp.sum(jnp.cumprod(accept_BxK.astype(jnp.int32), axis=1), axis=1)


def _probability(drafts: Drafts) -> jax.Array:
    """Of each draft, where it was drawn: float32 [B, K]."""
    if drafts.probs.shape[2] == 0:  # there is no branch
        return jnp.zeros(drafts.tokens.shape, jnp.float32)
    return jnp.take_along_axis(drafts.probs, drafts.chosen[..., None], axis=2)[..., 0]


def _residual(p_BxV: jax.Array, q_BxV: jax.Array) -> jax.Array:
    """max(p - q, 0), not normalised; p itself where q is nothing."""
    rest = jnp.maximum(p_BxV - q_BxV, 0.0)
    # A rejection says that p and q differ; only rounding can leave nothing over, and then p is the residual to within rounding.
    return jnp.where(jnp.any(rest > 0, axis=1, keepdims=True), rest, p_BxV)


def accept_greedy(drafts: Drafts, logits_BxWxV: jax.Array) -> Verdict:
    """Keeps the drafts that are the target's own argmax."""
    target_BxW = best_token(logits_BxWxV)
    ours = jnp.arange(drafts.tokens.shape[1]) < drafts.count[:, None]
    accepted = _leading(ours & (drafts.tokens == target_BxW[:, :-1]))
    return Verdict(accepted, jnp.take_along_axis(target_BxW, accepted[:, None], axis=1)[:, 0])


def accept_sampled(keys_B: jax.Array, drafts: Drafts, draft_ids_Q: jax.Array, logits_BxWxV: jax.Array, sampling: Sampling) -> Verdict:
    """Keeps drafts by rejection sampling; greedy rows are point masses and need no case of their own."""
    batch, width, vocabulary = logits_BxWxV.shape
    per_position = Sampling(*(jnp.repeat(setting, width) for setting in sampling))
    p_BxWxV = warp(logits_BxWxV.reshape(-1, vocabulary), per_position).reshape(batch, width, vocabulary)
    accept_keys, token_keys = jax.vmap(jax.random.split, out_axes=1)(keys_B)

    # 1. Each draft against its own position.
    u_BxK = jax.vmap(lambda key: jax.random.uniform(key, (width - 1,)))(accept_keys)
    p_BxK = jnp.take_along_axis(p_BxWxV[:, :-1], drafts.tokens[..., None], axis=2)[..., 0]
    q_BxK = jnp.where(drafts.looked_up[:, None], 1.0, _probability(drafts))
    ours = jnp.arange(width - 1) < drafts.count[:, None]
    accepted = _leading(ours & (u_BxK * q_BxK < p_BxK))

    # 2. The token behind the accepted ones: q is nothing where no draft was rejected.
    p_BxV = jnp.take_along_axis(p_BxWxV, accepted[:, None, None], axis=1)[:, 0]
    rejected = accepted < drafts.count
    if width > 1:
        place = jnp.minimum(accepted, width - 2)
        q_BxQ = jnp.take_along_axis(drafts.probs, place[:, None, None], axis=1)[:, 0]
        q_BxV = q_BxQ if q_BxQ.shape[1] == vocabulary else jnp.zeros_like(p_BxV).at[:, draft_ids_Q].set(q_BxQ)
        token_Bx1 = jnp.take_along_axis(drafts.tokens, place[:, None], axis=1)
        q_BxV = jnp.where(drafts.looked_up[:, None], jnp.arange(vocabulary) == token_Bx1, q_BxV)
        p_BxV = _residual(p_BxV, q_BxV * rejected[:, None])
    token = pick(token_keys, p_BxV)
    return Verdict(accepted, token)


def accept(keys_B: jax.Array, drafts: Drafts, draft_ids_Q: jax.Array, logits_BxWxV: jax.Array, sampling: Sampling) -> Verdict:
    """Accepts drafts and adds a token, per row.

    Args:
      keys_B: PRNG keys [B], used once.
      drafts: K drafts a row, of which the first `count` are its own.
      draft_ids_Q: int32 [Q], ids of the draft vocabulary.
      logits_BxWxV: float32 [B, K + 1, V], the target's logits at the last committed token and behind each draft.
      sampling: applied to the target as it was to the drafts.
    """
    return jax.lax.cond(
        jnp.all(sampling.temperature == 0),
        lambda: accept_greedy(drafts, logits_BxWxV),
        lambda: accept_sampled(keys_B, drafts, draft_ids_Q, logits_BxWxV, sampling),
    )
