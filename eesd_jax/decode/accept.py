"""Acceptance of drafts: which of them the target keeps, and the one token that it adds (Leviathan et al. 2023; Chen et al. 2023).

Why the text follows the law of plain decoding. Each step names the planted bugs of tests/decode/test_losslessness.py that break it.

1. A draft x is drawn from q, and q is kept as it was: `wrong_q`, `argmax_drafted_softmax_as_q`.
2. p is the target's distribution given the text and the drafts before x, warped as in plain decoding: `target_unwarped`,
   `position_off_by_one_after_the_first_round`, `candidates_that_see_each_other`.
3. x is kept where u q(x) < p(x), u uniform in [0, 1): with probability min(1, p/q), so x becomes text with probability min(p(x), q(x)):
   `accepted_where_p_is_at_least_half_of_q`.
4. Otherwise, with probability sum max(p - q, 0), the token is drawn from norm(max(p - q, 0)). That adds max(p - q, 0), and
   min(p, q) + max(p - q, 0) = p: `residual_of_p`, `draft_ids_forgotten_in_the_residual`.
5. Drafts after the first rejection were drawn for another text, and are dropped: `one_more_accepted`.
6. Where none is rejected, the token after the drafts is drawn from p itself: `bonus_from_q`.
7. Another candidate y for a rejected x is drawn from q without x, and steps 3 and 4 hold with what the rejection left of p in place of p:
   `others_with_the_first_ones_q`. After a kept y the token is drawn from p given y: `token_behind_the_draft_that_was_replaced`.
8. A looked-up draft was not drawn. The target draws its own token, which is the text in any case, and the draft is kept where it is that
   token, with probability p(x), as often as by steps 3 and 4 with q(x) = 1: `looked_up_drafts_taken_for_drawn_ones`,
   `looked_up_drafts_accepted_unseen`, `rejected_lookup_drawn_again`.
9. So each token follows p given those before, whatever made the controller draft on, as every draft that was drawn is judged. The text ends
   where plain decoding would end it: `eos_not_cut`.

What the target draws for a place of the text (steps 4, 6, 7 and 8), it draws with the key of that row and place, as plain decoding does.
So where only lookup drafts, the text is that of plain decoding, whatever was drafted and whoever else is in the batch. Steps 3 and 4 cannot
give that: which tokens u and q keep depends on what was drafted, so a place that was drafted has another draw than one that was not. (Draws
of both from the same noise would part less often from plain decoding's, and be kept less often: Daliri et al. 2024.) The keys of drafts
and of u are of the round: a draft that was dropped may have told the controller something, and its place must be drafted anew.

All in float32, without an epsilon. Several candidates: SpecInfer (Miao et al. 2024), drawn without replacement.

Axes: B rows, K drafts, A other candidates for each, W = K + 1 positions of the text, T = W + K A verified tokens (`tree.with_others`),
Q draft vocabulary, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from eesd_jax.decode.sampling import Sampling, Warped, draw, pick, probabilities, probability, warp
from eesd_jax.model import ops


class Keys(NamedTuple):
    """PRNG keys of acceptance.

    judge: [B], of the round, for what decides over drafts that were drawn. text: [B, W], of the target's own draw for each place after the
    last committed token, the same in any round.
    """

    judge: jax.Array
    text: jax.Array


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


def _own_draws(keys: Keys, drafts: Drafts, logits_BxTxV: jax.Array, p_BxT: Warped) -> jax.Array:
    """Draws what the target itself would write in the place of each draft, int32 [B, K]; only rows with looked-up drafts ask for it."""
    drafted = drafts.tokens.shape[1]

    def own() -> jax.Array:
        return draw(keys.text[:, :drafted], logits_BxTxV[:, :drafted], jax.tree.map(lambda field: field[:, :drafted], p_BxT))

    return jax.lax.cond(jnp.any(drafts.looked_up), own, lambda: drafts.tokens)


def accept_sampled(keys: Keys, drafts: Drafts, draft_ids_Q: jax.Array, logits_BxTxV: jax.Array, sampling: Sampling) -> Verdict:
    """Keeps drafts by rejection sampling; greedy rows are point masses and need no case of their own."""
    batch, _, vocabulary = logits_BxTxV.shape
    _, drafted, others = drafts.others.tokens.shape
    p_BxT = warp(logits_BxTxV, Sampling(*(setting[:, None] for setting in sampling)))

    def p_at(place_B: jax.Array) -> jax.Array:
        """The target's distribution at one position of each row, [B, V]; those at the others are never written down."""
        return probabilities(_at(logits_BxTxV, place_B), jax.tree.map(lambda field: _at(field, place_B), p_BxT))

    if not drafted:
        none = jnp.zeros(batch, jnp.int32)
        return Verdict(accepted=none, other=none - 1, token=pick(keys.text[:, 0], p_at(none)))
    accept_keys, other_keys = jax.vmap(jax.random.split, out_axes=1)(keys.judge)

    # 1. Each draft against its own position.
    u_BxK = jax.vmap(lambda key: jax.random.uniform(key, (drafted,)))(accept_keys)
    p_BxK = probability(logits_BxTxV[:, :drafted], jax.tree.map(lambda field: field[:, :drafted], p_BxT), drafts.tokens)
    drawn_kept = u_BxK * _probability(drafts) < p_BxK
    looked_up_kept = drafts.tokens == _own_draws(keys, drafts, logits_BxTxV, p_BxT)
    ours = jnp.arange(drafted) < drafts.count[:, None]
    accepted = _leading(ours & jnp.where(drafts.looked_up[:, None], looked_up_kept, drawn_kept))

    # 2. What a rejection leaves of the target's distribution: q is nothing where no draft was rejected, or the target drew for itself.
    p_BxV, other = p_at(accepted), jnp.full(batch, -1)

    def of_vocabulary(q_BxQ: jax.Array) -> jax.Array:
        return q_BxQ if q_BxQ.shape[1] == vocabulary else jnp.zeros_like(p_BxV).at[:, draft_ids_Q].set(q_BxQ)

    place = jnp.minimum(accepted, drafted - 1)
    rejected = (accepted < drafts.count) & ~drafts.looked_up
    p_BxV = _residual(p_BxV, of_vocabulary(_at(drafts.probs, place)) * rejected[:, None])

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
    return Verdict(accepted=accepted, other=other, token=pick(_at(keys.text, accepted + (other >= 0)), p_BxV))


def accept(keys: Keys, drafts: Drafts, draft_ids_Q: jax.Array, logits_BxTxV: jax.Array, sampling: Sampling) -> Verdict:
    """Accepts drafts and adds a token, per row.

    Args:
      keys: used once.
      drafts: K drafts a row, of which the first `count` are its own.
      draft_ids_Q: int32 [Q], ids of the draft vocabulary.
      logits_BxTxV: float32 [B, T, V], the target's logits at the last committed token, after each draft, and after each other candidate.
      sampling: applied to the target as it was to the drafts.
    """
    return jax.lax.cond(
        jnp.all(sampling.temperature == 0),
        lambda: accept_greedy(drafts, logits_BxTxV),
        lambda: accept_sampled(keys, drafts, draft_ids_Q, logits_BxTxV, sampling),
    )
