"""One round of early-exiting speculative decoding (EESD, section 3): draft, verify, accept, learn, roll back.

`round_step` takes and returns the same kind of state as the plain step, so the loop, streaming and stop strings are shared. Within a round:

1. Draft: blocks 1..N on the last committed token (and, in the same pass, on what lookup found in the text, where that is asked for), then,
   while the controller wants another draft in some row, the exit branch and blocks 1..N on what it drafted: on one token, or on several
   candidates for its place in one pass, of which only the first is drafted on from. The hidden states behind block N are kept.
2. Verify: blocks N+1..L on those hidden states, in one pass as wide as the longest draft needs; a tree, where there are several candidates.
3. Accept: rejection sampling (`decode/accept.py`); commit, cut at EOS and at the budget.
4. Learn: the controller's state is updated from what was drafted and accepted.
5. Roll back: only lengths say what is valid, so nothing is erased.

The exit block's keys and values are plain projections of its input, and all of them are written in verification, also that of the last
draft, which the branch itself never ran on; of a branch with a second input with what verification has found to stand there. What was
computed for another candidate moves to the place of the draft that it stands in for.

Axes: B rows, K drafts at most, A other candidates for each, W = K + 1 positions, N blocks that draft, D hidden, Q draft vocabulary, E ids
that end a text.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eesd_jax.config import DraftConfig
from eesd_jax.decode import accept
from eesd_jax.decode.controllers import Controller
from eesd_jax.decode.sampling import Draw, Sampling, sample
from eesd_jax.decode.sources import ngrams
from eesd_jax.decode.sources.lookup import look_up
from eesd_jax.decode.state import EOS, LENGTH, RUNNING, DecodeState, DraftState, ExitState, RoundLog, empty_log
from eesd_jax.model import cache as kv
from eesd_jax.model import exit_branch, llama
from eesd_jax.model.config import ModelConfig
from eesd_jax.model.tree import Tree, siblings, with_others


class _Drafting(NamedTuple):
    """Carried from draft to draft.

    k: int32 scalar, drafts so far. keep: bool [B], rows that draft on. hidden: [B, W, D] behind block N. others_hidden: [B, K A, D], of
    other candidates. drafts: see `verify.Drafts`. plan: the controller's. early: caches of blocks 1..N. others_early: entries of these
    blocks for other candidates, K A tokens. exit_cache: of the exit block, if there is one. deep: [B, D], see `fuse`.
    """

    k: jax.Array
    keep: jax.Array
    hidden: jax.Array
    others_hidden: jax.Array
    drafts: accept.Drafts
    plan: Any
    early: kv.KVCache
    others_early: kv.KVCache
    exit_cache: kv.KVCache | None
    deep: jax.Array | None


def start_drafting(
    draft: DraftConfig, branch: exit_branch.ExitBranch | None, controller: Controller, state: DecodeState, exits: ExitState
) -> DecodeState:
    """Adds to a prefilled state what speculation carries; `exits` is what prefill gave."""
    batch, capacity = state.tokens.shape
    probs = jnp.zeros((batch, draft.max_draft, _draft_vocab(branch)), jnp.float32)
    return state._replace(draft=DraftState(*exits, probs, controller.init(batch), empty_log(batch, capacity)))


def _draft(
    config: ModelConfig,
    draft: DraftConfig,
    controller: Controller,
    params: llama.Params,
    branch: exit_branch.ExitBranch | None,
    ngrams_E: jax.Array | None,
    sampling: Sampling,
    state: DecodeState,
    keys_B: jax.Array,
) -> _Drafting:
    """Step 1. Rows that stop early go through the motions until the last one stops; what they compute then lies behind their length."""
    batch, max_draft = state.length.shape[0], draft.max_draft
    layers = range(draft.exit_layer)
    running = state.finish == RUNNING
    # Of the tokens that the budget leaves, the last one need not be drafted: verification gives one in any case.
    useful = jnp.where(running, state.limit - state.length - 1, 0)
    decide_keys, draw_keys, plan_keys = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys_B)

    def early(tokens_BxT: jax.Array, k: jax.Array, caches: kv.KVCache, tree: Tree | None = None) -> tuple[jax.Array, kv.KVCache]:
        x = llama.embed(params, tokens_BxT)
        return llama.forward_blocks(config, params["blocks"], x, state.length - 1 + k, caches, layers, tree)

    def decide(plan: Any, k: jax.Array, confidence_B: jax.Array, keep_B: jax.Array) -> tuple[jax.Array, Any]:
        keys = jax.vmap(jax.random.fold_in, (0, None))(decide_keys, k)
        wanted, plan = controller.keep_drafting(keys, plan, k, confidence_B)
        return keep_B & wanted & (k < jnp.minimum(useful, max_draft)), plan

    last = jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1)[:, 0]
    caches = kv.KVCache(state.cache.k[: draft.exit_layer], state.cache.v[: draft.exit_layer])
    nothing = jnp.zeros((batch, max_draft), jnp.int32)
    if draft.longest_match:
        found = look_up(state.tokens, state.length, draft.longest_match, max_draft)
        if ngrams_E is not None:
            found = ngrams.fill_in(found, ngrams_E, state.tokens, state.length)
        plan = controller.propose(plan_keys, state.draft.controller, running, found)
        looked = jnp.minimum(plan.look_up, jnp.minimum(useful, max_draft))
        tokens = jnp.where(jnp.arange(max_draft) < looked[:, None], found.tokens, nothing)
        text_BxW = jnp.concatenate([last[:, None], tokens], axis=1)

        def at_width(width: int) -> tuple[jax.Array, kv.Held]:
            x, new = early(text_BxW[:, :width], jnp.int32(0), caches)
            return jnp.pad(x, ((0, 0), (0, max_draft + 1 - width), (0, 0))), kv.hold(new, max_draft + 1)

        # As in verification, only new entries leave the branches of the switch.
        hidden, new = _switch_width(draft, looked, at_width)
        caches = kv.write(caches, new, state.length - 1, after=hidden)
    else:
        looked, tokens = jnp.zeros(batch, jnp.int32), nothing
        h_Bx1xD, new = early(last[:, None], jnp.int32(0), caches)
        caches = kv.write(caches, new, state.length - 1, after=h_Bx1xD)
        hidden = jnp.pad(h_Bx1xD, ((0, 0), (0, max_draft), (0, 0)))
        plan = controller.propose(plan_keys, state.draft.controller, running)
    others = accept.empty_others(batch, max_draft, draft.others, _draft_vocab(branch))
    drafts = accept.Drafts(tokens, looked, nothing, state.draft.probs, looked > 0, others)
    others_hidden = jnp.zeros((batch, max_draft * draft.others, hidden.shape[-1]), hidden.dtype)
    others_early = kv.empty(config, batch, others_hidden.shape[1], hidden.dtype, blocks=draft.exit_layer)
    if branch is None:
        return _Drafting(jnp.int32(0), jnp.zeros(batch, bool), hidden, others_hidden, drafts, plan, caches, others_early, None, None)
    keep, plan = decide(plan, jnp.int32(0), jnp.ones(batch, jnp.float32), running & (looked == 0))
    exit_cache, deep = state.draft.exit_cache, state.draft.deep
    carry = _Drafting(jnp.int32(0), keep, hidden, others_hidden, drafts, plan, caches, others_early, exit_cache, deep)

    def body(c: _Drafting) -> _Drafting:
        start_B = state.length - 1 + c.k
        h_Bx1xD = jax.lax.dynamic_slice_in_dim(c.hidden, c.k, 1, axis=1)
        h_Bx1xD = exit_branch.fuse(config, branch, h_Bx1xD, None if c.deep is None else c.deep[:, None])
        x, new = exit_branch.run_exit_block(config, branch, h_Bx1xD, start_B, c.exit_cache)
        exit_cache = kv.write(c.exit_cache, new, start_B, after=x)
        output_Bx1xD = exit_branch.draft_output(config, branch, x)
        logits_BxQ = exit_branch.draft_logits(branch, output_Bx1xD)[:, 0]
        draw, *other_draws = _draw_candidates(draft.candidates, draw_keys, c.k, logits_BxQ, sampling)
        token_B = branch.draft_ids[draw.token]
        # Of the distribution as the branch gives it: a warped one would be sure of itself at temperature 0.
        chosen_logit = jnp.take_along_axis(logits_BxQ, draw.token[:, None], axis=1)[:, 0]
        confidence_B = jnp.exp(chosen_logit - jax.nn.logsumexp(logits_BxQ, axis=1))
        # Rows with looked-up drafts keep them, and run them once more: what is written again is what stands there.
        token_B = jnp.where(c.drafts.looked_up, c.drafts.tokens[:, c.k], token_B)
        drafts = c.drafts._replace(
            tokens=c.drafts.tokens.at[:, c.k].set(token_B),
            count=c.drafts.count + c.keep,
            chosen=c.drafts.chosen.at[:, c.k].set(draw.token),
            probs=c.drafts.probs.at[:, c.k].set(draw.probs),
        )
        others_hidden, others_early = c.others_hidden, c.others_early
        if not draft.others:
            x, new = early(token_B[:, None], c.k + 1, c.early)
        else:
            chosen, probs = (jnp.stack(field, axis=1) for field in zip(*other_draws, strict=True))
            of_place = accept.Others(branch.draft_ids[chosen], chosen, probs)
            drafts = drafts._replace(others=jax.tree.map(lambda all_K, new: all_K.at[:, c.k].set(new), c.drafts.others, of_place))
            x, new = early(jnp.concatenate([token_B[:, None], of_place.tokens], axis=1), c.k + 1, c.early, siblings(draft.candidates))
            first, rest = _split_first(new)
            place_B = jnp.full(batch, c.k * draft.others)
            others_hidden = jax.lax.dynamic_update_slice_in_dim(others_hidden, x[:, 1:], c.k * draft.others, axis=1)
            new, others_early = first, kv.write(others_early, rest, place_B, after=x)
        caches = kv.write(c.early, new, state.length + c.k, after=x)
        keep, plan = decide(c.plan, c.k + 1, confidence_B, c.keep)
        deep = None if c.deep is None else output_Bx1xD[:, 0]
        hidden = c.hidden.at[:, c.k + 1].set(x[:, 0])
        return _Drafting(c.k + 1, keep, hidden, others_hidden, drafts, plan, caches, others_early, exit_cache, deep)

    return jax.lax.while_loop(lambda c: jnp.any(c.keep), body, carry)


def _draw_candidates(candidates: int, keys_B: jax.Array, k: jax.Array, logits_BxQ: jax.Array, sampling: Sampling) -> list[Draw]:
    """Candidates for draft k, each drawn from what those before it leave of the branch's distribution."""
    draws = []
    for index in range(candidates):
        # The first one draws what it would draw alone.
        number = k if index == 0 else jnp.iinfo(jnp.int32).max - (k * candidates + index)
        draws.append(sample(jax.vmap(jax.random.fold_in, (0, None))(keys_B, number), logits_BxQ, sampling))
        logits_BxQ = jnp.where(jnp.arange(logits_BxQ.shape[1]) == draws[-1].token[:, None], -jnp.inf, logits_BxQ)
    return draws


def _split_first(entries: kv.KVCache) -> tuple[kv.KVCache, kv.KVCache]:
    """The first token's, and those of the others."""
    first = kv.KVCache(tuple(k[..., :1] for k in entries.k), tuple(v[:, :, :1] for v in entries.v))
    return first, kv.KVCache(tuple(k[..., 1:] for k in entries.k), tuple(v[:, :, 1:] for v in entries.v))


def _draft_vocab(branch: exit_branch.ExitBranch | None) -> int:
    return 0 if branch is None else branch.draft_ids.size


def _switch_width(draft: DraftConfig, count_B: jax.Array, at_width: Callable[[int], Any]) -> Any:
    """Runs a pass at the narrowest compiled width that holds every row's drafts, chosen on the device."""
    widths = draft.widths
    choice = jnp.searchsorted(jnp.array(widths), jnp.max(count_B) + 1)
    return jax.lax.switch(choice, [functools.partial(at_width, width) for width in widths])


class _Verified(NamedTuple):
    """What verification gives.

    verdict: of `verify.accept`. output: a value of the last block's output, [B]. deep: see `DraftState`. late, exit_entries: new keys and
    values of blocks N+1..L and of the exit block, of up to K + 1 tokens.
    """

    verdict: accept.Verdict
    output: jax.Array
    deep: jax.Array | None
    late: kv.Held
    exit_entries: kv.Held | None


def _verify(
    config: ModelConfig,
    draft: DraftConfig,
    params: llama.Params,
    branch: exit_branch.ExitBranch | None,
    sampling: Sampling,
    state: DecodeState,
    drafted: _Drafting,
    keys_B: jax.Array,
) -> _Verified:
    """Steps 2 and 3, at the narrowest compiled width that holds every row's drafts.

    Only new entries leave the branches of the switch: a cache that does would be copied.
    """
    start_B = state.length - 1

    def at_width(width: int) -> _Verified:
        drafts, hidden, tree = _narrow(drafted.drafts, width - 1), drafted.hidden[:, :width], None
        if draft.others and width > 1:
            tree = with_others(width, draft.others)
            hidden = jnp.concatenate([hidden, drafted.others_hidden[:, : (width - 1) * draft.others]], axis=1)
        x, late = llama.forward_blocks(
            config, params["blocks"], hidden, start_B, state.cache, range(draft.exit_layer, config.num_layers), tree
        )
        draft_ids = jnp.zeros(0, jnp.int32) if branch is None else branch.draft_ids
        verdict = accept.accept(keys_B, drafts, draft_ids, llama.logits(config, params, x), sampling)

        def along_text(entries: kv.KVCache) -> kv.Held:
            if tree is not None:
                entries = kv.take(entries, _slots_of_text(verdict, width))
            return kv.hold(entries, draft.max_draft + 1)

        if branch is None:
            return _Verified(verdict, x[:, 0, 0], None, along_text(late), None)
        deep, deep_BxTxD = None, None
        if branch.fusion is not None:
            own = llama.last_hidden(config, params, x)
            deep_BxTxD = exit_branch.before(state.draft.deep, own, tree)
            last_slot = verdict.accepted
            if tree is not None:
                last_slot = jnp.where(verdict.other < 0, last_slot, width + verdict.other)
            deep = jnp.take_along_axis(own, last_slot[:, None, None], axis=1)[:, 0]
        fused = exit_branch.fuse(config, branch, hidden, deep_BxTxD)
        exit_entries = exit_branch.run_exit_block(config, branch, fused, start_B, None, tree)[1]
        return _Verified(verdict, x[:, 0, 0], deep, along_text(late), along_text(exit_entries))

    return _switch_width(draft, drafted.drafts.count, at_width)


def _narrow(drafts: accept.Drafts, count: int) -> accept.Drafts:
    """The first `count` drafts, and the other candidates for them."""
    tokens, chosen, probs = (field[:, :count] for field in (drafts.tokens, drafts.chosen, drafts.probs))
    others = jax.tree.map(lambda field: field[:, :count], drafts.others)
    return drafts._replace(tokens=tokens, chosen=chosen, probs=probs, others=others)


def _slots_of_text(verdict: accept.Verdict, width: int) -> jax.Array:
    """Which slots of the tree are the text, int32 [B, W]: the drafts', but for the one that another candidate stands in for."""
    places_W, other = jnp.arange(width), verdict.other[:, None]
    return jnp.where((places_W == verdict.accepted[:, None] + 1) & (other >= 0), width + other, places_W)


def _where_rows(rows_B: jax.Array, new: jax.Array, before: jax.Array) -> jax.Array:
    """`new` in the rows that are set, [B, ...]."""
    return jnp.where(rows_B.reshape(-1, *[1] * (new.ndim - 1)), new, before)


def _tested_and_kept(drafted_B: jax.Array, accepted_B: jax.Array, committed_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Drafts that the text did not end before, and drafts that became text, int32 [B] each."""
    kept = jnp.minimum(accepted_B, committed_B)
    return jnp.where(committed_B <= accepted_B, kept, drafted_B), kept


def round_step(
    config: ModelConfig,
    draft: DraftConfig,
    controller: Controller,
    eos_ids_E: jax.Array,
    params: llama.Params,
    branch: exit_branch.ExitBranch | None,
    sampling: Sampling,
    state: DecodeState,
    ngrams_E: jax.Array | None = None,
) -> DecodeState:
    """Drafts, verifies and commits at least one token in every row that is not finished.

    Args:
      config, draft, controller: static.
      branch: None where only lookup drafts; blocks 1..N are then simply the first part of the target.
      eos_ids_E: int32 [E].
      state: with `state.draft` (see `start_drafting`); capacity at least limit + max_draft + 1.
      ngrams_E: the n-gram table that lookup goes on with (`ngrams.build`), None for none.
    """
    batch = state.length.shape[0]
    rows = jnp.arange(batch)
    # A row's length grows every round, so no key is used twice, and none depends on the other rows.
    round_keys = jax.vmap(jax.random.fold_in)(state.row_keys, state.length)
    draft_keys, verify_keys = jax.vmap(jax.random.split, out_axes=1)(round_keys)
    drafted = _draft(config, draft, controller, params, branch, ngrams_E, sampling, state, draft_keys)
    verified = _verify(config, draft, params, branch, sampling, state, drafted, verify_keys)

    # Caches: blocks 1..N were written while drafting.
    exit_layer, start_B = draft.exit_layer, state.length - 1
    old_late = kv.KVCache(state.cache.k[exit_layer:], state.cache.v[exit_layer:])
    late = kv.write(old_late, verified.late, start_B, after=verified.output)
    exit_cache = None
    if branch is not None:
        exit_cache = kv.write(drafted.exit_cache, verified.exit_entries, start_B, after=verified.output)
    accepted, other, token = verified.verdict
    early = drafted.early
    if draft.others:
        # To where the rejected draft stands. Where none is kept this is behind the text, and anything may stand there.
        of_other = kv.take(drafted.others_early, jnp.maximum(other, 0)[:, None])
        early = kv.write(early, of_other, start_B + accepted + 1, after=verified.output)
    cache = kv.KVCache(early.k + late.k, early.v + late.v)

    # Commit: the accepted drafts, another candidate, if one is kept, and the target's own token; cut behind the first EOS, at the budget.
    count = drafted.drafts.count
    place_W = jnp.arange(draft.max_draft + 1)
    new_BxW = jnp.where(place_W < accepted[:, None], jnp.pad(drafted.drafts.tokens, ((0, 0), (0, 1))), token[:, None])
    if draft.others:
        others = drafted.drafts.others.tokens.reshape(batch, -1)
        stand_in_Bx1 = jnp.take_along_axis(others, jnp.maximum(other, 0)[:, None], axis=1)
        new_BxW = jnp.where((place_W == accepted[:, None]) & (other[:, None] >= 0), stand_in_Bx1, new_BxW)
    running = state.finish == RUNNING
    offered = accepted + (other >= 0) + 1
    within = place_W < offered[:, None]
    is_eos = within & jnp.isin(new_BxW, eos_ids_E)
    up_to_eos = jnp.where(jnp.any(is_eos, axis=1), jnp.argmax(is_eos, axis=1) + 1, offered)
    committed = jnp.where(running, jnp.minimum(up_to_eos, state.limit - state.length), 0)
    ended_by_eos = jnp.any(is_eos & (place_W < committed[:, None]), axis=1)
    length = state.length + committed
    finish = jnp.where(ended_by_eos, EOS, jnp.where(length >= state.limit, LENGTH, RUNNING))
    tokens = jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))(state.tokens, new_BxW, state.length, 0)

    # Learn from what was committed: drafts behind the end of the text count neither way.
    tested, kept = _tested_and_kept(count, accepted, committed)
    old = state.draft
    # Controllers need not know of other candidates where there are none.
    replaced = (other >= 0,) if draft.others else ()
    learned = controller.update(old.controller, drafted.plan, tested, kept, *replaced)
    learned = jax.tree.map(functools.partial(_where_rows, running), learned, old.controller)
    log = RoundLog(
        old.log.rounds + running,
        *(
            field.at[rows, jnp.where(running, old.log.rounds, field.shape[1])].set(value)  # out of bounds is dropped
            for field, value in zip(
                old.log[1:], (count, kept, committed, controller.mean(old.controller), drafted.drafts.looked_up), strict=True
            )
        ),
    )
    return DecodeState(
        tokens,
        length,
        state.limit,
        jnp.where(running, finish, state.finish),
        state.row_keys,
        cache,
        DraftState(exit_cache, verified.deep, drafted.drafts.probs, learned, log),
    )
