"""Step 1 of a round: what looks up, draws and runs drafts, until no row wants more.

Verifying them is left to `round.py`, and how many there are to the controller.

Axes: as in `round.py`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eesd_jax.config import DraftConfig
from eesd_jax.decode import accept
from eesd_jax.decode.controllers import Controller, Offer
from eesd_jax.decode.sampling import Draw, Sampling, sample
from eesd_jax.decode.sources import ngrams
from eesd_jax.decode.sources.lookup import Lookup, look_up
from eesd_jax.decode.state import RUNNING, DecodeState
from eesd_jax.model import cache as kv
from eesd_jax.model import exit_branch, llama
from eesd_jax.model.config import ModelConfig
from eesd_jax.model.tree import Tree, siblings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculation:
    """Everything that a round reads and does not change; an argument of compiled programs.

    Attributes:
      config, draft: static.
      controller: how many tokens to draft.
      eos_ids: int32 [E].
      params: the target's weights.
      branch: None where only lookup drafts; blocks 1..N are then simply the first part of the target.
      sampling: how each row draws.
      ngrams: uint32, the n-gram table that lookup goes on with (`ngrams.build`), None for none.
    """

    config: ModelConfig = dataclasses.field(metadata={"static": True})
    draft: DraftConfig = dataclasses.field(metadata={"static": True})
    controller: Controller
    eos_ids: jax.Array
    params: llama.Params
    branch: exit_branch.ExitBranch | None
    sampling: Sampling
    ngrams: jax.Array | None = None

    @property
    def draft_vocab(self) -> int:
        """As of the branch."""
        return draft_vocab(self.branch)


_OF_ROUNDS = 2**32 - 1  # a place that no text has


class Keys(NamedTuple):
    """PRNG keys of one round: for the controller's plan and its decisions, for drafts, [B] each, and for verification."""

    plan: jax.Array
    decide: jax.Array
    draw: jax.Array
    verify: accept.Keys


class _Begun(NamedTuple):
    """Blocks 1..N run on the last committed token, and on looked-up drafts after it.

    plan: the controller's. count: int32 [B], looked-up drafts. tokens: int32 [B, K], those. hidden: [B, W, D], after block N. early: caches
    of blocks 1..N.
    """

    plan: Any
    count: jax.Array
    tokens: jax.Array
    hidden: jax.Array
    early: kv.KVCache


class Drafted(NamedTuple):
    """Carried from draft to draft.

    k: int32 scalar, drafts so far. keep: bool [B], rows that draft on. hidden: [B, W, D] after block N. others_hidden: [B, K A, D], of
    other candidates. drafts: see `accept.Drafts`. plan: the controller's. early: caches of blocks 1..N. others_early: entries of these
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


def split_keys(state: DecodeState, max_draft: int) -> Keys:
    """Derives the keys of a round; none depends on the other rows.

    The target's own draws have the keys of plain decoding, one for each place of the text. All else has keys of the round, of which none
    is used twice because a row's length grows every round.
    """
    fold = jax.vmap(jax.random.fold_in)
    text_keys = jax.vmap(fold, (None, 1), 1)(state.row_keys, state.length[:, None] + jnp.arange(max_draft + 1))
    round_keys = fold(fold(state.row_keys, jnp.full(state.length.shape, _OF_ROUNDS, jnp.uint32)), state.length)
    draft_keys, judge_keys = jax.vmap(jax.random.split, out_axes=1)(round_keys)
    decide_keys, draw_keys, plan_keys = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(draft_keys)
    return Keys(plan=plan_keys, decide=decide_keys, draw=draw_keys, verify=accept.Keys(judge=judge_keys, text=text_keys))


@jax.named_scope("draft")
def draft(spec: Speculation, state: DecodeState, keys: Keys) -> Drafted:
    """Drafts until no row wants more.

    Rows that stop early go through the motions until the last one stops; what they compute then lies after their length.
    """
    begun = _begin_with_lookup(spec, state, keys) if spec.draft.longest_match else _begin(spec, state, keys)
    first = _before_drafting(spec, state, begun)
    if spec.branch is None:
        return first
    # Rows with looked-up drafts have theirs.
    wants = (state.finish == RUNNING) & ~first.drafts.looked_up
    keep, plan = _decide(spec, state, keys, first._replace(keep=wants), jnp.ones(wants.shape, jnp.float32))
    one_more = functools.partial(_draft_one, spec, state, keys)
    return jax.lax.while_loop(lambda drafted: jnp.any(drafted.keep), one_more, first._replace(keep=keep, plan=plan))


def _run_early(
    spec: Speculation, state: DecodeState, tokens_BxT: jax.Array, k: jax.Array, caches: kv.KVCache, tree: Tree | None = None
) -> tuple[jax.Array, kv.KVCache]:
    """Runs blocks 1..N on tokens of which the first stands k after the last committed one: [B, T, D], and their new entries."""
    x = llama.embed(spec.params, tokens_BxT)
    layers = range(spec.draft.exit_layer)
    return llama.forward_blocks(spec.config, spec.params["blocks"], x, state.length - 1 + k, caches, layers, tree)


def _early_caches(spec: Speculation, state: DecodeState) -> kv.KVCache:
    return kv.KVCache(k=state.cache.k[: spec.draft.exit_layer], v=state.cache.v[: spec.draft.exit_layer])


def _last_token(state: DecodeState) -> jax.Array:
    return jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1)[:, 0]


def _useful(spec: Speculation, state: DecodeState) -> jax.Array:
    """Counts the drafts that a row has room for, int32 [B]."""
    # Of the tokens that the budget leaves, the last one need not be drafted: verification gives one in any case.
    left = jnp.where(state.finish == RUNNING, state.limit - state.length - 1, 0)
    return jnp.minimum(left, spec.draft.max_draft)


def _begin(spec: Speculation, state: DecodeState, keys: Keys) -> _Begun:
    """Runs blocks 1..N on the last committed token."""
    batch, max_draft = state.length.shape[0], spec.draft.max_draft
    h_Bx1xD, new = _run_early(spec, state, _last_token(state)[:, None], jnp.int32(0), _early_caches(spec, state))
    return _Begun(
        plan=spec.controller.propose(keys.plan, state.draft.controller, Offer(running=state.finish == RUNNING)),
        count=jnp.zeros(batch, jnp.int32),
        tokens=jnp.zeros((batch, max_draft), jnp.int32),
        hidden=jnp.pad(h_Bx1xD, ((0, 0), (0, max_draft), (0, 0))),
        early=kv.write(_early_caches(spec, state), new, state.length - 1, after=h_Bx1xD),
    )


def _begin_with_lookup(spec: Speculation, state: DecodeState, keys: Keys) -> _Begun:
    """Looks up, and runs blocks 1..N on the last committed token and on what the controller takes of what was found."""
    max_draft, caches = spec.draft.max_draft, _early_caches(spec, state)
    offer = Offer(running=state.finish == RUNNING, found=_look_up(spec, state))
    plan = spec.controller.propose(keys.plan, state.draft.controller, offer)
    count = jnp.minimum(spec.controller.look_up(plan, offer), _useful(spec, state))
    tokens = jnp.where(jnp.arange(max_draft) < count[:, None], offer.found.tokens, 0)
    text_BxW = jnp.concatenate([_last_token(state)[:, None], tokens], axis=1)

    def at_width(width: int) -> tuple[jax.Array, kv.Held]:
        x, new = _run_early(spec, state, text_BxW[:, :width], jnp.int32(0), caches)
        return jnp.pad(x, ((0, 0), (0, max_draft + 1 - width), (0, 0))), kv.hold(new, max_draft + 1)

    # As in verification, only new entries leave the branches of the switch.
    hidden, new = switch_width(spec.draft, count, at_width)
    return _Begun(plan=plan, count=count, tokens=tokens, hidden=hidden, early=kv.write(caches, new, state.length - 1, after=hidden))


@jax.named_scope("look_up")
def _look_up(spec: Speculation, state: DecodeState) -> Lookup:
    """Finds drafts in the text, and where it has none, in the n-gram table."""
    found = look_up(state.tokens, state.length, spec.draft.longest_match, spec.draft.max_draft)
    return found if spec.ngrams is None else ngrams.fill_in(found, spec.ngrams, state.tokens, state.length)


def _before_drafting(spec: Speculation, state: DecodeState, begun: _Begun) -> Drafted:
    """Makes room for the branch's drafts."""
    batch, max_draft, others = *begun.tokens.shape, spec.draft.others
    hidden = begun.hidden
    return Drafted(
        k=jnp.int32(0),
        keep=jnp.zeros(batch, bool),
        hidden=hidden,
        others_hidden=jnp.zeros((batch, max_draft * others, hidden.shape[-1]), hidden.dtype),
        drafts=accept.Drafts(
            tokens=begun.tokens,
            count=begun.count,
            chosen=jnp.zeros((batch, max_draft), jnp.int32),
            probs=state.draft.probs,
            looked_up=begun.count > 0,
            others=accept.empty_others(batch, max_draft, others, spec.draft_vocab),
        ),
        plan=begun.plan,
        early=begun.early,
        others_early=kv.empty(spec.config, batch, max_draft * others, hidden.dtype, blocks=spec.draft.exit_layer),
        exit_cache=state.draft.exit_cache,
        deep=state.draft.deep,
    )


def _decide(spec: Speculation, state: DecodeState, keys: Keys, drafted: Drafted, confidence_B: jax.Array) -> tuple[jax.Array, Any]:
    """Asks the controller whether to draft one more, in rows that still keep drafting and have room: bool [B], and its plan."""
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys.decide, drafted.k)
    wanted, plan = spec.controller.keep_drafting(step_keys, drafted.plan, drafted.k, confidence_B)
    return drafted.keep & wanted & (drafted.k < _useful(spec, state)), plan


def _draft_one(spec: Speculation, state: DecodeState, keys: Keys, drafted: Drafted) -> Drafted:
    """Draws one more token in every row, and runs it through blocks 1..N."""
    branch, k, drafts = spec.branch, drafted.k, drafted.drafts
    output_Bx1xD, exit_cache = _run_exit(spec, state, drafted)
    logits_BxQ = exit_branch.draft_logits(branch, output_Bx1xD)[:, 0]
    draw, *others = _draw_candidates(spec.draft.candidates, keys.draw, k, logits_BxQ, spec.sampling)
    # Of the distribution as the branch gives it: a warped one would be sure of itself at temperature 0.
    chosen_logit = jnp.take_along_axis(logits_BxQ, draw.token[:, None], axis=1)[:, 0]
    confidence_B = jnp.exp(chosen_logit - jax.nn.logsumexp(logits_BxQ, axis=1))
    # Rows with looked-up drafts keep them, and run them once more: what is written again is what stands there.
    token_B = jnp.where(drafts.looked_up, drafts.tokens[:, k], branch.draft_ids[draw.token])
    drafted = drafted._replace(
        drafts=drafts._replace(
            tokens=drafts.tokens.at[:, k].set(token_B),
            count=drafts.count + drafted.keep,
            chosen=drafts.chosen.at[:, k].set(draw.token),
            probs=drafts.probs.at[:, k].set(draw.probs),
        ),
        exit_cache=exit_cache,
        deep=None if drafted.deep is None else output_Bx1xD[:, 0],
    )
    drafted = _run_candidates(spec, state, drafted, others) if others else _run_draft(spec, state, drafted)
    drafted = drafted._replace(k=k + 1)
    keep, plan = _decide(spec, state, keys, drafted, confidence_B)
    return drafted._replace(keep=keep, plan=plan)


@jax.named_scope("exit_branch")
def _run_exit(spec: Speculation, state: DecodeState, drafted: Drafted) -> tuple[jax.Array, kv.KVCache]:
    """Runs the exit branch on the last token: what its head reads, [B, 1, D], and its cache."""
    start_B = state.length - 1 + drafted.k
    h_Bx1xD = jax.lax.dynamic_slice_in_dim(drafted.hidden, drafted.k, 1, axis=1)
    h_Bx1xD = exit_branch.fuse(spec.config, spec.branch, h_Bx1xD, None if drafted.deep is None else drafted.deep[:, None])
    x, new = exit_branch.run_exit_block(spec.config, spec.branch, h_Bx1xD, start_B, drafted.exit_cache)
    return exit_branch.draft_output(spec.config, spec.branch, x), kv.write(drafted.exit_cache, new, start_B, after=x)


def _run_draft(spec: Speculation, state: DecodeState, drafted: Drafted) -> Drafted:
    """Runs draft k through blocks 1..N."""
    k = drafted.k
    x, new = _run_early(spec, state, drafted.drafts.tokens[:, k, None], k + 1, drafted.early)
    early = kv.write(drafted.early, new, state.length + k, after=x)
    return drafted._replace(hidden=drafted.hidden.at[:, k + 1].set(x[:, 0]), early=early)


def _run_candidates(spec: Speculation, state: DecodeState, drafted: Drafted, draws: list[Draw]) -> Drafted:
    """Runs draft k and the other candidates for its place through blocks 1..N; entries of the others are kept apart."""
    branch, k, others = spec.branch, drafted.k, spec.draft.others
    chosen, probs = (jnp.stack(field, axis=1) for field in zip(*draws, strict=True))
    of_place = accept.Others(tokens=branch.draft_ids[chosen], chosen=chosen, probs=probs)
    all_others = jax.tree.map(lambda all_K, new: all_K.at[:, k].set(new), drafted.drafts.others, of_place)
    tokens = jnp.concatenate([drafted.drafts.tokens[:, k, None], of_place.tokens], axis=1)
    x, new = _run_early(spec, state, tokens, k + 1, drafted.early, siblings(spec.draft.candidates))
    first, rest = _split_first(new)
    return drafted._replace(
        hidden=drafted.hidden.at[:, k + 1].set(x[:, 0]),
        others_hidden=jax.lax.dynamic_update_slice_in_dim(drafted.others_hidden, x[:, 1:], k * others, axis=1),
        drafts=drafted.drafts._replace(others=all_others),
        early=kv.write(drafted.early, first, state.length + k, after=x),
        others_early=kv.write(drafted.others_early, rest, jnp.full(tokens.shape[0], k * others), after=x),
    )


def _draw_candidates(candidates: int, keys_B: jax.Array, k: jax.Array, logits_BxQ: jax.Array, sampling: Sampling) -> list[Draw]:
    """Draws candidates for draft k, each from what those before it leave of the branch's distribution."""
    draws = []
    for index in range(candidates):
        # The first one draws what it would draw alone.
        number = k if index == 0 else jnp.iinfo(jnp.int32).max - (k * candidates + index)
        draws.append(sample(jax.vmap(jax.random.fold_in, (0, None))(keys_B, number), logits_BxQ, sampling))
        logits_BxQ = jnp.where(jnp.arange(logits_BxQ.shape[1]) == draws[-1].token[:, None], -jnp.inf, logits_BxQ)
    return draws


def _split_first(entries: kv.KVCache) -> tuple[kv.KVCache, kv.KVCache]:
    """Splits the first token's entries from those of the others."""
    first = kv.KVCache(k=tuple(k[..., :1] for k in entries.k), v=tuple(v[:, :, :1] for v in entries.v))
    return first, kv.KVCache(k=tuple(k[..., 1:] for k in entries.k), v=tuple(v[:, :, 1:] for v in entries.v))


def draft_vocab(branch: exit_branch.ExitBranch | None) -> int:
    """Q, 0 without a branch."""
    return 0 if branch is None else branch.draft_ids.size


def switch_width(draft: DraftConfig, count_B: jax.Array, at_width: Callable[[int], Any]) -> Any:
    """Runs a pass at the narrowest compiled width that holds every row's drafts, chosen on the device."""
    widths = draft.widths
    choice = jnp.searchsorted(jnp.array(widths), jnp.max(count_B) + 1, method="compare_all")
    return jax.lax.switch(choice, [functools.partial(at_width, width) for width in widths])
