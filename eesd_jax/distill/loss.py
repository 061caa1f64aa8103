"""What the exit branch learns by: the target's own distribution, position by position (EESD, section 3.2; Hinton et al. 2015).

Logits of one chunk of positions exist at a time: `[B, T, V]` never does, as a chunk's part of the gradient is computed at once.

Axes: B rows, T tokens, C positions of a chunk, D hidden, V vocabulary, Q draft vocabulary, K kept tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eesd_jax.config import LossConfig


class Totals(NamedTuple):
    """Sums over the positions that count, float32 scalars; divided by `positions` they are means.

    loss: the weighted loss. agreement: positions where branch and target would both say the same in greedy decoding. overlap: of the two
    distributions, 1 - TV(p, q), which is the probability that a sampled draft is accepted. coverage: of the target's probability, the part
    on the draft vocabulary. positions: how many counted.
    """

    loss: jax.Array
    agreement: jax.Array
    overlap: jax.Array
    coverage: jax.Array
    positions: jax.Array


class TopTokens(NamedTuple):
    """What a cache keeps of the target's distribution at each position.

    ids: int32 [..., K], the most probable tokens, best first. log_probs: float32 [..., K], over the whole vocabulary.
    """

    ids: jax.Array
    log_probs: jax.Array


def against_logits(config: LossConfig, draft_ids_Q: jax.Array, student: jax.Array, teacher: jax.Array) -> Totals:
    """Losses of a chunk against the target's logits.

    Args:
      student: float32 [..., Q], the branch's logits. teacher: float32 [..., V].

    Returns:
      `Totals` with an entry a position, [...], each a position's own (`positions` is 1).
    """
    vocab_size, drafts = teacher.shape[-1], student.shape[-1]
    log_p_all = jax.nn.log_softmax(teacher)
    log_p = log_p_all if drafts == vocab_size else jnp.take(log_p_all, draft_ids_Q, axis=-1)
    best = jnp.argmax(teacher, axis=-1)
    best_draft = jnp.minimum(jnp.searchsorted(draft_ids_Q, best), drafts - 1)
    return _against_all(config, jax.nn.log_softmax(student), log_p, best_draft, draft_ids_Q[best_draft] == best)


def against_top_tokens(config: LossConfig, draft_ids_Q: jax.Array, vocab_size: int, student: jax.Array, teacher: TopTokens) -> Totals:
    """The same against what a cache kept. Probability that was not kept is left out of the loss and of the overlap.

    With every token kept this is `against_logits`; losses that need all of them are refused earlier (`trainer.check_cache`).
    """
    drafts = student.shape[-1]
    place = jnp.minimum(jnp.searchsorted(draft_ids_Q, teacher.ids), drafts - 1)  # [..., K]
    can_draft = draft_ids_Q[place] == teacher.ids
    if teacher.ids.shape[-1] == vocab_size:
        shape = teacher.ids.shape[:-1]
        flat = jnp.full((teacher.ids[..., 0].size, vocab_size), -jnp.inf)
        rows = jnp.arange(flat.shape[0])[:, None]
        log_p_all = flat.at[rows, teacher.ids.reshape(flat.shape)].set(teacher.log_probs.reshape(flat.shape)).reshape(*shape, vocab_size)
        log_p = log_p_all if drafts == vocab_size else jnp.take(log_p_all, draft_ids_Q, axis=-1)
        return _against_all(config, jax.nn.log_softmax(student), log_p, place[..., 0], can_draft[..., 0])
    log_q = jax.nn.log_softmax(student)
    log_q_top = jnp.take_along_axis(log_q, place, axis=-1)
    p = jnp.where(can_draft, jnp.exp(teacher.log_probs), 0.0)
    loss = config.soft * -jnp.sum(p * log_q_top, axis=-1)
    loss += config.hard * -jnp.where(can_draft[..., 0], log_q_top[..., 0], 0.0)
    agreement = (jnp.argmax(student, axis=-1) == place[..., 0]) & can_draft[..., 0]
    overlap = jnp.sum(jnp.minimum(p, jnp.exp(log_q_top)), axis=-1)
    return Totals(loss, agreement.astype(jnp.float32), overlap, jnp.sum(p, axis=-1), jnp.ones_like(loss))


def _against_all(config: LossConfig, log_q: jax.Array, log_p: jax.Array, best_draft: jax.Array, can_draft_best: jax.Array) -> Totals:
    """log_q, log_p: [..., Q]; best_draft: [...], the draft that is the target's most probable token, where there is one."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    overlap = jnp.sum(jnp.minimum(p, q), axis=-1)
    log_q_best = jnp.take_along_axis(log_q, best_draft[..., None], axis=-1)[..., 0]
    loss = jnp.zeros(overlap.shape)
    if config.soft:
        loss += config.soft * -jnp.sum(p * log_q, axis=-1)
    if config.reverse_kl:
        # Where the target's probability underflows its logarithm is kept finite: a draft there costs much, not everything.
        loss += config.reverse_kl * jnp.sum(q * (log_q - jnp.maximum(log_p, -100.0)), axis=-1)
    if config.total_variation:
        loss += config.total_variation * (1.0 - overlap)
    if config.hard:
        loss += config.hard * -jnp.where(can_draft_best, log_q_best, 0.0)
    agreement = (jnp.argmax(log_q, axis=-1) == best_draft) & can_draft_best
    return Totals(loss, agreement.astype(jnp.float32), overlap, jnp.sum(p, axis=-1), jnp.ones_like(loss))


def regression(student_BxTxD: jax.Array, target_BxTxD: jax.Array) -> jax.Array:
    """Half the squared distance of the branch's normed output to the target's normed last hidden state, a mean over D: [B, T]."""
    difference = student_BxTxD.astype(jnp.float32) - target_BxTxD.astype(jnp.float32)
    return 0.5 * jnp.mean(difference * difference, axis=-1)


def sum_in_chunks(
    score: Callable[..., Totals],
    chunk: int,
    params: Any,
    student_BxTxD: jax.Array,
    loss_mask_BxT: jax.Array,
    teacher: jax.Array | TopTokens | tuple,
) -> Totals:
    """Sums `score(params, student, teacher)` over the positions of `loss_mask`, `chunk` positions of every row at a time.

    Only `loss` has a gradient, in `params` and `student`. It is computed along with the value, chunk by chunk, while the logits are there:
    so nothing of them is kept, and nothing is computed twice.

    Args:
      score: takes params, [B, C, D] and the teacher's part of those positions, gives `Totals` of [B, C].
      chunk: positions at once; a last, shorter part is padded.
      params: any pytree of float arrays. teacher: any pytree of [B, T, ...].
    """

    def one_chunk(params: Any, student_BxCxD: jax.Array, mask_BxC: jax.Array, part: jax.Array | TopTokens | tuple) -> Totals:
        # Not a product with the mask: what stands at positions that do not count may be any finite number.
        return Totals(*(jnp.sum(jnp.where(mask_BxC, value, 0.0)) for value in score(params, student_BxCxD, part)))

    def with_loss(*arguments: Any) -> tuple[jax.Array, Totals]:
        totals = one_chunk(*arguments)
        return totals.loss, totals

    @jax.custom_vjp
    def total(params: Any, *sequences: Any) -> Totals:
        def step(totals: Totals, parts: tuple) -> tuple[Totals, None]:
            return jax.tree.map(jnp.add, totals, one_chunk(params, *parts)), None

        return jax.lax.scan(step, zero_totals(), split(sequences))[0]

    def forward(params: Any, *sequences: Any) -> tuple[Totals, tuple]:
        def step(sums: tuple[Totals, Any], parts: tuple) -> tuple[tuple[Totals, Any], jax.Array]:
            (_, totals), (of_params, of_student) = jax.value_and_grad(with_loss, (0, 1), has_aux=True)(params, *parts)
            return jax.tree.map(jnp.add, sums, (totals, of_params)), of_student

        zeros = zero_totals(), jax.tree.map(jnp.zeros_like, params)
        (totals, of_params), of_student = jax.lax.scan(step, zeros, split(sequences))
        return totals, (of_params, join_positions(of_student, student_BxTxD.shape[1]))

    def backward(gradients: tuple, by: Totals) -> tuple:
        return *jax.tree.map(lambda gradient: (by.loss * gradient).astype(gradient.dtype), gradients), None, None

    def split(sequences: tuple) -> tuple:
        return jax.tree.map(lambda leaf: split_positions(leaf, chunk), sequences)

    total.defvjp(forward, backward)
    return total(params, student_BxTxD, loss_mask_BxT, teacher)


def zero_totals() -> Totals:
    return Totals(*(jnp.zeros((), jnp.float32) for _ in Totals._fields))


def split_positions(x: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] to [T / C, B, C, ...]; where C does not divide T, zeros are added. Rows stay on their devices."""
    chunk = min(chunk, x.shape[1])
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def join_positions(parts: jax.Array, length: int) -> jax.Array:
    """Undoes `split_positions`: [T / C, B, C, ...] to [B, T, ...]."""
    x = jnp.moveaxis(parts, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
