"""Drafts from what the target wrote before: for each few tokens that it often wrote, the one that it most often wrote next.

Lookup in the text itself (`lookup.py`) has nothing to say where the text is new. A table of n-grams, counted once in text that the target
generated, has: no model is asked here either, and a draft costs a few reads of memory (a static lookup cache in llama.cpp's terms; compare
REST, He et al. 2023, which searches the text itself).

The table is hashed. An entry says which token follows, how sure that is, and has some bits of its n-gram's hash, so that another n-gram is
seldom taken for it; if it is, a draft is wrong, and the text is not.

Axes: B rows, S capacity in tokens, K drafts at most, E entries.
"""

import collections
import itertools
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eesd_jax.decode.sources.lookup import Lookup, expected_drafts

ORDER = 4  # tokens of the longest n-gram that something is known of
MAX_TOKEN = 2**18 - 1
# Drafting on stops where the drafts so far are right with less than this probability, as the table has it, or behind so many.
_SURE = 0.15
_MOST_DRAFTS = 4
# Of what counting says, so much comes true in answers to prompts that nothing was counted in (MT-bench, the built-in model).
_TRUST = 0.6
_WAYS = 2  # places where an entry may lie
_TOKEN_BITS, _SURE_BITS, _CHECK_BITS = 18, 4, 10


def build(texts: Iterable[Sequence[int]], size: int) -> np.ndarray:
    """Counts the n-grams of texts, and keeps what was right most often: uint32 [E].

    Args:
      texts: token ids up to `MAX_TOKEN`.
      size: E, a power of two.
    """
    following: dict[tuple[int, ...], collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for text in texts:
        for order in range(1, ORDER + 1):
            for start in range(len(text) - order):
                following[tuple(text[start : start + order])][text[start + order]] += 1
    known = []
    for ngram, counts in following.items():
        # The smallest of the most frequent, so that the table does not depend on the order of the texts.
        token, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
        known.append((-count, ngram, token, count / (counts.total() + 1)))
    known.sort()
    entries = np.zeros(size, np.uint32)
    places, checks = _hashes([ngram for _, ngram, _, _ in known], size)
    for (_, _, token, sure), place, check in zip(known, places, checks, strict=True):
        ways = entries[place : place + _WAYS]
        free = np.flatnonzero(ways == 0)
        if free.size:
            ways[free[0]] = _pack(token, sure, check)
    return entries


def _hashes(ngrams: Sequence[tuple[int, ...]], size: int) -> tuple[np.ndarray, np.ndarray]:
    places, checks = np.zeros(len(ngrams), np.int64), np.zeros(len(ngrams), np.uint32)
    orders = np.array([len(ngram) for ngram in ngrams])
    for order in range(1, ORDER + 1):
        (chosen,) = np.nonzero(orders == order)
        tokens = np.array([ngrams[i] for i in chosen], np.uint32).reshape(len(chosen), order)
        places[chosen], checks[chosen] = _locate(np, [tokens[:, order - 1 - back] for back in range(order)], size)
    return places, checks


def _locate(xp: ModuleType, back: Sequence[Any], size: int) -> tuple[Any, Any]:
    """The first place of an n-gram, and its check bits. back: uint32, its tokens from the last to the first; xp: NumPy or jax.numpy."""
    value = xp.full(back[0].shape, len(back), xp.uint32)
    for token in back:
        value = (value * xp.uint32(5) + token + xp.uint32(1)) * xp.uint32(0x9E3779B1)
        # The last steps of MurmurHash3, after which every bit depends on every other.
        value = (value ^ (value >> xp.uint32(16))) * xp.uint32(0x85EBCA6B)
        value = (value ^ (value >> xp.uint32(13))) * xp.uint32(0xC2B2AE35)
        value = value ^ (value >> xp.uint32(16))
    buckets = size // _WAYS
    return (value & xp.uint32(buckets - 1)).astype(xp.int32) * _WAYS, value >> xp.uint32(32 - _CHECK_BITS)


def _pack(token: int, sure: float, check: int) -> int:
    levels = 2**_SURE_BITS - 1
    # Never 0, which is an empty place.
    return token | max(1, round(sure * levels)) << _TOKEN_BITS | int(check) << (_TOKEN_BITS + _SURE_BITS)


def _next_token(entries: jax.Array, back: Sequence[jax.Array], known_B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What follows the longest n-gram that something is known of: the token [B], how sure that is [B], and the order [B], 0 for none.

    Args:
      back: int32 [B] each, the last token, the one before, ..., `ORDER` of them.
      known_B: how many of them there are.
    """
    token, sure, order = jnp.zeros_like(back[0]), jnp.zeros(back[0].shape, jnp.float32), jnp.zeros_like(back[0])
    unsigned = [one.astype(jnp.uint32) for one in back]
    for n in range(1, ORDER + 1):
        place, check = _locate(jnp, unsigned[:n], entries.size)
        for way in range(_WAYS):
            entry = entries[place + way]
            hit = (entry != 0) & (entry >> (_TOKEN_BITS + _SURE_BITS) == check) & (n <= known_B)
            token = jnp.where(hit, (entry & MAX_TOKEN).astype(jnp.int32), token)
            level = (entry >> _TOKEN_BITS) & (2**_SURE_BITS - 1)
            sure = jnp.where(hit, level.astype(jnp.float32) / (2**_SURE_BITS - 1), sure)
            order = jnp.where(hit, n, order)
    return token, sure, order


def foretold(entries: np.ndarray, texts: Iterable[Sequence[int]]) -> float:
    """The share of the texts' tokens, from the second on, that the table names when it is asked for what follows those before."""
    right = total = 0
    ask = jax.jit(lambda entries, back, known: _next_token(entries, back, known)[0])
    for text in texts:
        padded = np.zeros(-(-len(text) // 512) * 512, np.int32)  # few lengths, so that little is compiled
        padded[: len(text)] = text
        back = [np.roll(padded, i) for i in range(ORDER)]
        found = np.asarray(ask(entries, back, np.arange(1, padded.size + 1, dtype=np.int32)))
        right += int(np.sum(found[: len(text) - 1] == padded[1 : len(text)]))
        total += len(text) - 1
    return right / max(total, 1)


def fill_in(found: Lookup, entries: jax.Array, tokens_BxS: jax.Array, length_B: jax.Array) -> Lookup:
    """What the table says where more of its drafts are expected to be right than of those that the text has."""
    known = look_up(entries, tokens_BxS, length_B, found.tokens.shape[1])

    def hopes(drafts: Lookup) -> jax.Array:
        there = jnp.arange(drafts.chance.shape[1]) < drafts.count[:, None]
        return expected_drafts(jnp.where(there, drafts.chance, 0.0))[:, -1]

    better = hopes(known) > hopes(found)
    return Lookup(
        jnp.where(better[:, None], known.tokens, found.tokens),
        jnp.where(better, known.count, found.count),
        jnp.where(better[:, None], known.chance, found.chance),
    )


def look_up(entries: jax.Array, tokens_BxS: jax.Array, length_B: jax.Array, max_draft: int) -> Lookup:
    """What the table says of the end of the text.

    Args:
      entries: of `build`.
      tokens_BxS: int32, valid up to each row's length.
      length_B: int32 [B], at least 1.
      max_draft: K.
    """
    last = [jnp.take_along_axis(tokens_BxS, jnp.maximum(length_B - 1 - i, 0)[:, None], axis=1)[:, 0] for i in range(ORDER)]
    count, sure = jnp.zeros_like(length_B), jnp.ones(length_B.shape, jnp.float32)
    drafts, chances = [], []
    for _ in range(min(max_draft, _MOST_DRAFTS)):
        token, here, order = _next_token(entries, last, length_B + len(drafts))
        sure = jnp.where(order > 0, sure * here, 0.0)
        count += sure >= _SURE
        drafts.append(token)
        chances.append(_TRUST * here)
        last = [token, *itertools.islice(last, ORDER - 1)]
    tokens_BxK, chance_BxK = (jnp.pad(jnp.stack(columns, axis=1), ((0, 0), (0, max_draft - len(columns)))) for columns in (drafts, chances))
    return Lookup(tokens_BxK, count, chance_BxK)
