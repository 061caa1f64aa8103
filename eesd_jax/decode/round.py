"""One round of early-exiting speculative decoding (EESD, section 3): draft, verify, accept, commit, learn.

`round_step` takes and returns the same kind of state as the plain step, so the loop, streaming and stop strings are shared. Within a round:

1. Draft: blocks 1..N on the last committed token (and, in the same pass, on what lookup found in the text, where that is asked for), then,
   while the controller wants another draft in some row, the exit branch and blocks 1..N on what it drafted: on one token, or on several
   candidates for its place in one pass, of which only the first is drafted on from. The hidden states after block N are kept.
2. Verify: blocks N+1..L on those hidden states, in one pass as wide as the longest draft needs; a tree, where there are several candidates.
3. Accept: rejection sampling (`decode/accept.py`).
4. Commit: the accepted drafts and the target's own token, cut at EOS and at the budget. Only lengths say what is valid, so what was
   rejected is not erased.
5. Learn: the controller's state is updated from what was drafted and accepted.

The exit block's keys and values are plain projections of its input, and all of them are written in verification, also that of the last
draft, which the branch itself never ran on; of a branch with a second input with what verification has found to stand there. What was
computed for another candidate moves to the place of the draft that it stands in for.

Axes: B rows, K drafts at most, A other candidates for each, W = K + 1 positions, N blocks that draft, D hidden, Q draft vocabulary, E ids
that end a text.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eesd_jax.config import DraftConfig
from eesd_jax.decode import accept
from eesd_jax.decode.controllers import Controller, Outcome, Posterior
from eesd_jax.decode.draft import Drafted, Keys, Speculation, draft, draft_vocab, split_keys, switch_width
from eesd_jax.decode.state import EOS, LENGTH, RUNNING, DecodeState, DraftState, ExitState, RoundLog, empty_log
from eesd_jax.model import cache as kv
from eesd_jax.model import exit_branch, llama
from eesd_jax.model.tree import Tree, with_others


class _Verified(NamedTuple):
    """Blocks N+1..L run on the drafts, in one pass of T tokens.

    width: static, positions of the text in it. tree: which token follows which, None for one text. output: [B, T, D], of the last block.
    logits: float32 [B, T, V]. last_hidden: [B, T, D], normed, None where no branch has it as an input. late, exit_entries: new keys and
    values of blocks N+1..L and of the exit block, if there is one.
    """

    width: int
    tree: Tree | None
    output: jax.Array
    logits: jax.Array
    last_hidden: jax.Array | None
    late: kv.KVCache
    exit_entries: kv.KVCache | None


class _Accepted(NamedTuple):
    """What verification leaves.

    verdict: of `accept.accept`. output: a value of the last block's output, [B]. deep: see `DraftState`. late, exit_entries: as in
    `_Verified`, of the tokens that can become text, with room for K + 1.
    """

    verdict: accept.Verdict
    output: jax.Array
    deep: jax.Array | None
    late: kv.Held
    exit_entries: kv.Held | None


class _Committed(NamedTuple):
    """The text after the round: as in `DecodeState` and `DraftState`; count: int32 [B], tokens that it grew by."""

    count: jax.Array
    tokens: jax.Array
    length: jax.Array
    finish: jax.Array
    cache: kv.KVCache
    exit_cache: kv.KVCache | None


class _Learned(NamedTuple):
    """The controller's state and the log after the round."""

    controller: Any
    log: RoundLog


def start_drafting(
    draft: DraftConfig, branch: exit_branch.ExitBranch | None, controller: Controller, state: DecodeState, exits: ExitState
) -> DecodeState:
    """Adds to a prefilled state what speculation carries; `exits` is what prefill gave."""
    batch, capacity = state.tokens.shape
    # A weak type would compile the loop a second time, for the types that leave it.
    learned = jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(jnp.asarray(leaf).dtype), controller.init(batch))
    return state._replace(
        draft=DraftState(
            exit_cache=exits.exit_cache,
            deep=exits.deep,
            probs=jnp.zeros((batch, draft.max_draft, draft_vocab(branch)), jnp.float32),
            controller=learned,
            log=empty_log(batch, capacity),
        )
    )


def round_step(spec: Speculation, state: DecodeState) -> DecodeState:
    """Drafts, verifies and commits at least one token in every row that is not finished.

    Args:
      spec: what does not change.
      state: with `state.draft` (see `start_drafting`); capacity at least limit + max_draft + 1.
    """
    keys = split_keys(state, spec.draft.max_draft)
    drafted = draft(spec, state, keys)

    def at_width(width: int) -> _Accepted:
        verified = _verify(spec, state, drafted, width)
        return _accept(spec, drafted, verified, keys)

    # Only new entries leave the branches of the switch: a cache that does would be copied.
    accepted = switch_width(spec.draft, drafted.drafts.count, at_width)
    committed = _commit(spec, state, drafted, accepted)
    learned = _learn(spec, state, drafted, accepted, committed)
    return DecodeState(
        tokens=committed.tokens,
        length=committed.length,
        limit=state.limit,
        finish=committed.finish,
        row_keys=state.row_keys,
        cache=committed.cache,
        draft=DraftState(
            exit_cache=committed.exit_cache,
            deep=accepted.deep,
            probs=drafted.drafts.probs,
            controller=learned.controller,
            log=learned.log,
        ),
    )


# --- Verify ---


@jax.named_scope("verify")
def _verify(spec: Speculation, state: DecodeState, drafted: Drafted, width: int) -> _Verified:
    """Runs blocks N+1..L, and the exit block for its keys and values, on the last token and `width` - 1 drafts."""
    config, draft, branch, start_B = spec.config, spec.draft, spec.branch, state.length - 1
    hidden, tree = drafted.hidden[:, :width], None
    if draft.others and width > 1:
        tree = with_others(width, draft.others)
        hidden = jnp.concatenate([hidden, drafted.others_hidden[:, : (width - 1) * draft.others]], axis=1)
    layers = range(draft.exit_layer, config.num_layers)
    x, late = llama.forward_blocks(config, spec.params["blocks"], hidden, start_B, state.cache, layers, tree)
    last_hidden = deep_BxTxD = exit_entries = None
    if branch is not None and branch.fusion is not None:
        last_hidden = llama.last_hidden(config, spec.params, x)
        deep_BxTxD = exit_branch.before(state.draft.deep, last_hidden, tree)
    if branch is not None:
        fused = exit_branch.fuse(config, branch, hidden, deep_BxTxD)
        exit_entries = exit_branch.run_exit_block(config, branch, fused, start_B, None, tree)[1]
    logits = llama.logits(config, spec.params, x)
    return _Verified(width=width, tree=tree, output=x, logits=logits, last_hidden=last_hidden, late=late, exit_entries=exit_entries)


# --- Accept ---


@jax.named_scope("accept")
def _accept(spec: Speculation, drafted: Drafted, verified: _Verified, keys: Keys) -> _Accepted:
    """Decides which drafts are kept, and keeps the entries along the text."""
    width, tree, branch = verified.width, verified.tree, spec.branch
    draft_ids = jnp.zeros(0, jnp.int32) if branch is None else branch.draft_ids
    drafts = _narrow(drafted.drafts, width - 1)
    verdict = accept.accept(keys.verify, drafts, draft_ids, verified.logits, spec.sampling)

    def along_text(entries: kv.KVCache) -> kv.Held:
        if tree is not None:
            entries = kv.take(entries, _slots_of_text(verdict, width))
        return kv.hold(entries, spec.draft.max_draft + 1)

    deep = None
    if verified.last_hidden is not None:
        last_slot = verdict.accepted
        if tree is not None:
            last_slot = jnp.where(verdict.other < 0, last_slot, width + verdict.other)
        deep = jnp.take_along_axis(verified.last_hidden, last_slot[:, None, None], axis=1)[:, 0]
    return _Accepted(
        verdict=verdict,
        output=verified.output[:, 0, 0],
        deep=deep,
        late=along_text(verified.late),
        exit_entries=None if branch is None else along_text(verified.exit_entries),
    )


def _narrow(drafts: accept.Drafts, count: int) -> accept.Drafts:
    """Takes the first `count` drafts, and the other candidates for them."""
    tokens, chosen, probs = (field[:, :count] for field in (drafts.tokens, drafts.chosen, drafts.probs))
    others = jax.tree.map(lambda field: field[:, :count], drafts.others)
    return drafts._replace(tokens=tokens, chosen=chosen, probs=probs, others=others)


def _slots_of_text(verdict: accept.Verdict, width: int) -> jax.Array:
    """Says which slots of the tree are the text, int32 [B, W]: the drafts', but for the one that another candidate stands in for."""
    places_W, other = jnp.arange(width), verdict.other[:, None]
    return jnp.where((places_W == verdict.accepted[:, None] + 1) & (other >= 0), width + other, places_W)


# --- Commit ---


@jax.named_scope("commit")
def _commit(spec: Speculation, state: DecodeState, drafted: Drafted, accepted: _Accepted) -> _Committed:
    """Adds the round's tokens to the text, cut after the first EOS and at the budget, and their entries to the caches."""
    cache, exit_cache = _write_caches(spec, state, drafted, accepted)
    place_W = jnp.arange(spec.draft.max_draft + 1)
    new_BxW = _new_tokens(spec, drafted, accepted.verdict)
    offered = accepted.verdict.accepted + (accepted.verdict.other >= 0) + 1
    running = state.finish == RUNNING
    is_eos = (place_W < offered[:, None]) & jnp.isin(new_BxW, spec.eos_ids)
    up_to_eos = jnp.where(jnp.any(is_eos, axis=1), jnp.argmax(is_eos, axis=1) + 1, offered)
    count = jnp.where(running, jnp.minimum(up_to_eos, state.limit - state.length), 0)
    ended_by_eos = jnp.any(is_eos & (place_W < count[:, None]), axis=1)
    length = state.length + count
    finish = jnp.where(ended_by_eos, EOS, jnp.where(length >= state.limit, LENGTH, RUNNING))
    return _Committed(
        count=count,
        tokens=jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))(state.tokens, new_BxW, state.length, 0),
        length=length,
        finish=jnp.where(running, finish, state.finish),
        cache=cache,
        exit_cache=exit_cache,
    )


def _new_tokens(spec: Speculation, drafted: Drafted, verdict: accept.Verdict) -> jax.Array:
    """Lines up the accepted drafts, another candidate, if one is kept, and the target's own token: int32 [B, W]."""
    place_W = jnp.arange(spec.draft.max_draft + 1)
    accepted, other = verdict.accepted[:, None], verdict.other[:, None]
    new_BxW = jnp.where(place_W < accepted, jnp.pad(drafted.drafts.tokens, ((0, 0), (0, 1))), verdict.token[:, None])
    if spec.draft.others:
        others = drafted.drafts.others.tokens.reshape(other.shape[0], -1)
        stand_in_Bx1 = jnp.take_along_axis(others, jnp.maximum(other, 0), axis=1)
        new_BxW = jnp.where((place_W == accepted) & (other >= 0), stand_in_Bx1, new_BxW)
    return new_BxW


def _write_caches(spec: Speculation, state: DecodeState, drafted: Drafted, accepted: _Accepted) -> tuple[kv.KVCache, kv.KVCache | None]:
    """Writes the entries of verification; those of blocks 1..N were written while drafting."""
    exit_layer, start_B, verdict = spec.draft.exit_layer, state.length - 1, accepted.verdict
    late = kv.KVCache(k=state.cache.k[exit_layer:], v=state.cache.v[exit_layer:])
    late = kv.write(late, accepted.late, start_B, after=accepted.output)
    exit_cache, early = None, drafted.early
    if spec.branch is not None:
        exit_cache = kv.write(drafted.exit_cache, accepted.exit_entries, start_B, after=accepted.output)
    if spec.draft.others:
        # To where the rejected draft stands. Where none is kept this is after the text, and anything may stand there.
        of_other = kv.take(drafted.others_early, jnp.maximum(verdict.other, 0)[:, None])
        early = kv.write(early, of_other, start_B + verdict.accepted + 1, after=accepted.output)
    return kv.KVCache(k=early.k + late.k, v=early.v + late.v), exit_cache


# --- Learn ---


@jax.named_scope("learn")
def _learn(spec: Speculation, state: DecodeState, drafted: Drafted, accepted: _Accepted, committed: _Committed) -> _Learned:
    """Tells the controller what became of its drafts, and logs the round, in rows that ran."""
    running, old = state.finish == RUNNING, state.draft
    # From what was committed: drafts after the end of the text count neither way.
    tested, kept = _tested_and_kept(drafted.drafts.count, accepted.verdict.accepted, committed.count)
    outcome = Outcome(drafted=tested, accepted=kept, replaced=accepted.verdict.other >= 0)
    learned = spec.controller.update(old.controller, drafted.plan, outcome)
    return _Learned(
        controller=jax.tree.map(functools.partial(_where_rows, running), learned, old.controller),
        log=_add_round(
            old.log,
            running,
            _belief(spec.controller, old.controller, running.size),
            drafted=drafted.drafts.count,
            accepted=kept,
            committed=committed.count,
            looked_up=drafted.drafts.looked_up,
        ),
    )


def _tested_and_kept(drafted_B: jax.Array, accepted_B: jax.Array, committed_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Counts drafts that the text did not end before, and drafts that became text, int32 [B] each."""
    kept = jnp.minimum(accepted_B, committed_B)
    return jnp.where(committed_B <= accepted_B, kept, drafted_B), kept


def _belief(controller: Controller, learned: Any, batch: int) -> Posterior:
    """Asks the controller what it expects; NaN where it has no such belief."""
    unknown = jnp.full(batch, jnp.nan, jnp.float32)
    return controller.posterior(learned) or Posterior(alpha=unknown, beta=unknown)


def _add_round(log: RoundLog, running_B: jax.Array, belief: Posterior, **counts: jax.Array) -> RoundLog:
    """Writes the round into the log of the rows that ran."""
    rows, most = jnp.arange(running_B.size), log.drafted.shape[1]
    place_B = jnp.where(running_B, log.rounds, most)  # out of bounds is dropped
    added = {name: getattr(log, name).at[rows, place_B].set(value) for name, value in (belief._asdict() | counts).items()}
    return log._replace(rounds=log.rounds + running_B, **added)


def _where_rows(rows_B: jax.Array, new: jax.Array, before: jax.Array) -> jax.Array:
    """Takes `new` in the rows that are set, [B, ...], in the type of before."""
    return jnp.where(rows_B.reshape(-1, *[1] * (before.ndim - 1)), new, before).astype(before.dtype)
