"""Acceptance of drafts: which of them the target keeps, and the one token that it adds (Leviathan et al. 2023; Chen et al. 2023).

Exact: float32 throughout, no epsilon. A draft x is accepted where `u * q(x) < p(x)` with u uniform in [0, 1), that is, with probability
min(1, p/q); at the first rejection the token comes from norm(max(p - q, 0)); behind a round without one it comes from p itself.

Where there are other candidates for the rejected draft, each is tested in turn against what the rejection before has left of p, and takes
its own q off it in the same way (SpecInfer, Miao et al. 2024); candidates are drawn without replacement. Behind an accepted one the token
comes from the target's distribution behind that one.

Axes: B rows, K drafts, A other candidates for each, W = K + 1 positions of the text, T = W + K A verified tokens (`tree.with_others`),
Q draft vocabulary, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from eesd_jax.decode.sampling import Sampling, pick, probabilities, probability, warp
from eesd_jax.model import ops


class Others(NamedTuple):
    """Other candidates for every draft: tokens and chosen int32 [B, K, A], probs float32 [B, K, A, Q]; see `Drafts`."""

    tokens: jax.Array
    chosen: jax.Array
    probs: jax.Array


def empty_others(batch: int, drafts: int, others: int, draft_vocab: int) -> Others:
    """Room for them."""
    none = jnp.zeros((batch, drafts, others), jnp.int32)
    return Others(none, none, jnp.zeros((*none.shape, draft_vocab), jnp.float32))


class Drafts(NamedTuple):
    """What was drafted in a round.

    tokens: int32 [B, K], ids of the target. count: int32 [B], how many of them are this row's.
    chosen: int32 [B, K], the tokens' places in the draft vocabulary. probs: float32 [B, K, Q], the distributions they were drawn from.
    looked_up: bool [B], rows whose drafts were not drawn at all: each is a point mass, and any token of the vocabulary.
    others: what else was drawn for the place of each draft, given that draft and the others before it; unused in rows with looked-up ones.
    """

    tokens: jax.Array
    count: jax.Array
    chosen: jax.Array
    probs: jax.Array
    looked_up: jax.Array
    others: Others


class Verdict(NamedTuple):
    """What is kept of the drafts.

    accepted: int32 [B], drafts kept. other: int32 [B], which of the K A other candidates is kept behind them, -1 for none.
    token: int32 [B], the target's own token behind all that.
    """

    accepted: jax.Array
    other: jax.Array
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


def _at(values_BxN: jax.Array, place_B: jax.Array) -> jax.Array:
    """One value, or one array, of each row's: [B, N, ...] to [B, ...]."""
    if values_BxN.shape[1] == 1:  # a gather would copy it
        return values_BxN[:, 0]
    return jnp.take_along_axis(values_BxN, place_B.reshape(-1, *[1] * (values_BxN.ndim - 1)), axis=1)[:, 0]


def _may_be_replaced(drafts: Drafts, accepted_B: jax.Array) -> jax.Array:
    """Rows in which a draft was rejected that there are other candidates for, bool [B]."""
    return (accepted_B < drafts.count) & ~drafts.looked_up


def accept_greedy(drafts: Drafts, logits_BxTxV: jax.Array) -> Verdict:
    """Keeps the drafts that are the target's own argmax."""
    batch, drafted, others = drafts.others.tokens.shape
    target_BxT = ops.argmax(logits_BxTxV)
    ours = jnp.arange(drafted) < drafts.count[:, None]
    accepted = _leading(ours & (drafts.tokens == target_BxT[:, :drafted]))
    token, other = _at(target_BxT, accepted), jnp.full(batch, -1)
    if drafted and others:
        place = jnp.minimum(accepted, drafted - 1)
        hits_BxA = (_at(drafts.others.tokens, place) == token[:, None]) & _may_be_replaced(drafts, accepted)[:, None]
        other = jnp.where(jnp.any(hits_BxA, axis=1), place * others + jnp.argmax(hits_BxA, axis=1), -1)
        token = jnp.where(other < 0, token, _at(target_BxT, drafted + 1 + other))
    return Verdict(accepted, other, token)


def accept_sampled(keys_B: jax.Array, drafts: Drafts, draft_ids_Q: jax.Array, logits_BxTxV: jax.Array, sampling: Sampling) -> Verdict:
    """Keeps drafts by rejection sampling; greedy rows are point masses and need no case of their own."""
    batch, _, vocabulary = logits_BxTxV.shape
    _, drafted, others = drafts.others.tokens.shape
    p_BxT = warp(logits_BxTxV, Sampling(*(setting[:, None] for setting in sampling)))

    def p_at(place_B: jax.Array) -> jax.Array:
        """The target's distribution at one position of each row, [B, V]; those at the others are never written down."""
        return probabilities(_at(logits_BxTxV, place_B), jax.tree.map(lambda field: _at(field, place_B), p_BxT))

    accept_keys, token_keys, other_keys = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys_B)

    # 1. Each draft against its own position.
    u_BxK = jax.vmap(lambda key: jax.random.uniform(key, (drafted,)))(accept_keys)
    p_BxK = probability(logits_BxTxV[:, :drafted], jax.tree.map(lambda field: field[:, :drafted], p_BxT), drafts.tokens)
    q_BxK = jnp.where(drafts.looked_up[:, None], 1.0, _probability(drafts))
    ours = jnp.arange(drafted) < drafts.count[:, None]
    accepted = _leading(ours & (u_BxK * q_BxK < p_BxK))

    # 2. What a rejection leaves of the target's distribution: q is nothing where no draft was rejected.
    p_BxV, other = p_at(accepted), jnp.full(batch, -1)
    if not drafted:
        return Verdict(accepted, other, pick(token_keys, p_BxV))

    def of_vocabulary(q_BxQ: jax.Array) -> jax.Array:
        return q_BxQ if q_BxQ.shape[1] == vocabulary else jnp.zeros_like(p_BxV).at[:, draft_ids_Q].set(q_BxQ)

    place = jnp.minimum(accepted, drafted - 1)
    point_BxV = jnp.arange(vocabulary) == _at(drafts.tokens, place)[:, None]
    q_BxV = jnp.where(drafts.looked_up[:, None], point_BxV, of_vocabulary(_at(drafts.probs, place)))
    p_BxV = _residual(p_BxV, q_BxV * (accepted < drafts.count)[:, None])

    # 3. The other candidates for the rejected draft, each against what is left.
    u_BxA = jax.vmap(lambda key: jax.random.uniform(key, (others,)))(other_keys)
    tokens_BxA, chosen_BxA, probs_BxAxQ = (_at(field, place) for field in drafts.others)
    replaceable = _may_be_replaced(drafts, accepted)
    for i in range(others):
        untried = replaceable & (other < 0)
        left_BxV = p_BxV / jnp.sum(p_BxV, axis=1, keepdims=True)
        q_x = _at(probs_BxAxQ[:, i], chosen_BxA[:, i])
        kept = untried & (u_BxA[:, i] * q_x < _at(left_BxV, tokens_BxA[:, i]))
        other = jnp.where(kept, place * others + i, other)
        p_BxV = jnp.where((untried & ~kept)[:, None], _residual(left_BxV, of_vocabulary(probs_BxAxQ[:, i])), p_BxV)
    if others:
        p_BxV = jnp.where((other < 0)[:, None], p_BxV, p_at(drafted + 1 + other))
    return Verdict(accepted, other, pick(token_keys, p_BxV))


def accept(keys_B: jax.Array, drafts: Drafts, draft_ids_Q: jax.Array, logits_BxTxV: jax.Array, sampling: Sampling) -> Verdict:
    """Accepts drafts and adds a token, per row.

    Args:
      keys_B: PRNG keys [B], used once.
      drafts: K drafts a row, of which the first `count` are its own.
      draft_ids_Q: int32 [Q], ids of the draft vocabulary.
      logits_BxTxV: float32 [B, T, V], the target's logits at the last committed token, behind each draft, and behind each other candidate.
      sampling: applied to the target as it was to the drafts.
    """
    return jax.lax.cond(
        jnp.all(sampling.temperature == 0),
        lambda: accept_greedy(drafts, logits_BxTxV),
        lambda: accept_sampled(keys_B, drafts, draft_ids_Q, logits_BxTxV, sampling),
    )
