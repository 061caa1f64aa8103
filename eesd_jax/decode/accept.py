"""Acceptance of drafts: which of them the target keeps, and the one token that it adds (Leviathan et al. 2023; Chen et al. 2023).

Why the text follows the law of plain decoding. Each step names the planted bugs of tests/decode/test_losslessness.py that break it.

1. A draft x is drawn from q, and q is kept as it was: `wrong_q`, `argmax_drafted_softmax_as_q`. A looked-up draft is drawn from a point
   mass, q(x) = 1: `looked_up_drafts_taken_for_drawn_ones`.
2. p is the target's distribution given the text and the drafts before x, warped as in plain decoding: `target_unwarped`,
   `position_off_by_one_after_the_first_round`, `candidates_that_see_each_other`.
3. x is kept where u q(x) < p(x), u uniform in [0, 1): with probability min(1, p/q), so x becomes text with probability min(p(x), q(x)):
   `accepted_where_p_is_at_least_half_of_q`, `looked_up_drafts_accepted_unseen`.
4. Otherwise, with probability sum max(p - q, 0), the token is drawn from norm(max(p - q, 0)). That adds max(p - q, 0), and
   min(p, q) + max(p - q, 0) = p: `residual_of_p`, `rejected_lookup_left_in_the_residual`, `draft_ids_forgotten_in_the_residual`.
5. Drafts after the first rejection were drawn for another text, and are dropped: `one_more_accepted`.
6. Where none is rejected, the token after the drafts is drawn from p itself: `bonus_from_q`.
7. Another candidate y for a rejected x is drawn from q without x, and steps 3 and 4 hold with what the rejection left of p in place of p:
   `others_with_the_first_ones_q`. After a kept y the token is drawn from p given y: `token_behind_the_draft_that_was_replaced`.
8. So each token follows p given those before, whatever made the controller draft on, as every draft that was drawn is judged. The text ends
   where plain decoding would end it: `eos_not_cut`.

All in float32, without an epsilon. Several candidates: SpecInfer (Miao et al. 2024), drawn without replacement.

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
    """Makes room for them."""
    none = jnp.zeros((batch, drafts, others), jnp.int32)
    return Others(tokens=none, chosen=none, probs=jnp.zeros((*none.shape, draft_vocab), jnp.float32))


class Drafts(NamedTuple):
    """The drafts of a round.

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
    """The drafts that are kept, and the token after them.

    accepted: int32 [B], drafts kept. other: int32 [B], which of the K A other candidates is kept after them, -1 for none.
    token: int32 [B], the target's own token after all that.
    """

    accepted: jax.Array
    other: jax.Array
    token: jax.Array


def _leading(accept_BxK: jax.Array) -> jax.Array:
    """Counts how many of the first ones hold, int32 [B]."""
    return jnp.sum(jnp.cumprod(accept_BxK.astype(jnp.int32), axis=1), axis=1)


def _probability(drafts: Drafts) -> jax.Array:
    """Returns q of each draft, float32 [B, K]."""
    if drafts.probs.shape[2] == 0:  # there is no branch
        return jnp.zeros(drafts.tokens.shape, jnp.float32)
    return jnp.take_along_axis(drafts.probs, drafts.chosen[..., None], axis=2)[..., 0]


def _residual(p_BxV: jax.Array, q_BxV: jax.Array) -> jax.Array:
    """Returns max(p - q, 0), not normalised; p itself where q is nothing."""
    rest = jnp.maximum(p_BxV - q_BxV, 0.0)
    # A rejection says that p and q differ; only rounding can leave nothing over, and then p is the residual to within rounding.
    return jnp.where(jnp.any(rest > 0, axis=1, keepdims=True), rest, p_BxV)


def _at(values_BxN: jax.Array, place_B: jax.Array) -> jax.Array:
    """Takes one value, or one array, of each row's: [B, N, ...] to [B, ...]."""
    if values_BxN.shape[1] == 1:  # a gather would copy it
        return values_BxN[:, 0]
    return jnp.take_along_axis(values_BxN, place_B.reshape(-1, *[1] * (values_BxN.ndim - 1)), axis=1)[:, 0]


def _may_be_replaced(drafts: Drafts, accepted_B: jax.Array) -> jax.Array:
    """Finds rows in which a draft was rejected that there are other candidates for, bool [B]."""
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
    return Verdict(accepted=accepted, other=other, token=token)


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
        return Verdict(accepted=accepted, other=other, token=pick(token_keys, p_BxV))

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
    return Verdict(accepted=accepted, other=other, token=pick(token_keys, p_BxV))


def accept(keys_B: jax.Array, drafts: Drafts, draft_ids_Q: jax.Array, logits_BxTxV: jax.Array, sampling: Sampling) -> Verdict:
    """Accepts drafts and adds a token, per row.

    Args:
      keys_B: PRNG keys [B], used once.
      drafts: K drafts a row, of which the first `count` are its own.
      draft_ids_Q: int32 [Q], ids of the draft vocabulary.
      logits_BxTxV: float32 [B, T, V], the target's logits at the last committed token, after each draft, and after each other candidate.
      sampling: applied to the target as it was to the drafts.
    """
    return jax.lax.cond(
        jnp.all(sampling.temperature == 0),
        lambda: accept_greedy(drafts, logits_BxTxV),
        lambda: accept_sampled(keys_B, drafts, draft_ids_Q, logits_BxTxV, sampling),
    )
