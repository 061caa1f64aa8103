"""Writing into the key/value cache on CPU: two kernels for all blocks, in place of a scatter for each array of each.

What a pass leaves is first copied, array behind array, into one: so it has one shape for every number of tokens, and can leave a
conditional without being padded. From there each row's entries go to their slots, in place.

Axes: A arrays (the keys of all blocks, then the values), B rows, K key/value heads, H channels of a head, T new tokens, W of them at most,
S slots of the cache.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from llvmlite import ir

from eesd_jax.kernels.cpu import calls
from eesd_jax.kernels.cpu.calls import BYTES, I32, I64
from eesd_jax.model.cache import KVCache

GATHER, SCATTER = "eesd_jax_gather_entries", "eesd_jax_scatter_entries"
# Floats to move below which waking another thread costs more than it brings.
_SHARED = 20_000


class Gathered(NamedTuple):
    """New entries of all blocks: one array, float32 [A, room], and how many tokens they are of, int32."""

    array: jax.Array
    tokens: jax.Array


def can_hold(entries: KVCache, slots: int) -> bool:
    """Whether these kernels move such entries: float32, of one block at least."""
    del slots
    return bool(entries.k) and entries.k[0].dtype == jnp.float32


def hold(entries: KVCache, slots: int) -> Gathered:
    """`model/cache.py`'s `hold`: entries as one array with their number, which has the same shape for every number of tokens."""
    batch, heads, channels, tokens = entries.k[0].shape
    return Gathered(gather(entries.k + entries.v, batch * heads * channels * slots), jnp.int32(tokens))


def can_write(cache: KVCache, new: KVCache | Gathered, start_B: jax.Array) -> bool:
    """Whether these kernels write such entries."""
    del cache, start_B
    return isinstance(new, Gathered) or can_hold(new, 0)


def write_at(cache: KVCache, new: KVCache | Gathered, start_B: jax.Array) -> KVCache:
    """`model/cache.py`'s `write_at`, in place where the caches are not used otherwise."""
    if isinstance(new, KVCache):
        new = hold(new, new.k[0].shape[3])
    caches, blocks = scatter(cache.k + cache.v, new.array, new.tokens, start_B), len(cache.k)
    return KVCache(caches[:blocks], caches[blocks:])


def gather(entries_A: Sequence[jax.Array], room: int) -> jax.Array:
    """Float32 arrays of equal size, each into the first part of a row of the result, [A, room]; what is behind is left as memory was."""
    count, floats = len(entries_A), entries_A[0].size
    _register_gather(count)
    split = _split(count, count * floats)
    result = jax.ShapeDtypeStruct((count, room), jnp.float32)
    return jax.ffi.ffi_call(f"{GATHER}_{count}", result)(*entries_A, **split, floats=np.int64(floats), room=np.int64(room))


def scatter(caches_A: Sequence[jax.Array], gathered: jax.Array, tokens: jax.Array, start_B: jax.Array) -> tuple[jax.Array, ...]:
    """The same caches, in place where they are not used otherwise, with new entries.

    Args:
      caches_A: of keys [B, K, H, S], then as many of values [B, K, S, H].
      gathered: of `gather`, from [B, K, H, T] and [B, K, T, H].
      tokens: int32 scalar, T.
      start_B: int32 [B], the slot of each row's first entry; no later than S - T, as with `dynamic_update_slice`.
    """
    count, (batch, heads, channels, slots) = len(caches_A), caches_A[0].shape
    _register_scatter(count)
    sizes = {"channels": channels, "heads": heads, "room": gathered.shape[1], "slots": slots}
    attributes = _split(count * batch, gathered.size) | {name: np.int64(size) for name, size in sizes.items()}
    results = tuple(jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in caches_A)
    call = jax.ffi.ffi_call(f"{SCATTER}_{count}", results, input_output_aliases={3 + i: i for i in range(count)})
    return tuple(call(gathered, tokens, start_B, *caches_A, **attributes))


def _split(pieces: int, floats: int) -> dict[str, np.int64]:
    return calls.split(pieces, 2) if floats > _SHARED else {"chunks": np.int64(1), "helpers": np.int64(0)}


def _names(prefix: str, count: int) -> tuple[tuple[str, ...], ...]:
    return tuple((f"{prefix}{i}",) for i in range(count))


@functools.cache
def _register_gather(count: int) -> None:
    attributes = ("chunks", "floats", "helpers", "room")
    calls.register(f"{GATHER}_{count}", _names("in", count), (("out",),), attributes, functools.partial(_add_gather_chunk, count))


@functools.cache
def _register_scatter(count: int) -> None:
    arguments = (("gathered",), ("tokens",), ("start", "batch"), *_names("old", count))
    attributes = ("channels", "chunks", "heads", "helpers", "room", "slots")
    calls.register(f"{SCATTER}_{count}", arguments, _names("out", count), attributes, functools.partial(_add_scatter_chunk, count))


def _copy(builder: ir.IRBuilder, target: ir.Value, source: ir.Value, floats: ir.Value) -> None:
    memcpy = calls.external(builder.module, "memcpy", BYTES, BYTES, BYTES, I64)
    builder.call(memcpy, (builder.bitcast(target, BYTES), builder.bitcast(source, BYTES), builder.mul(floats, I64(4))))


def _add_gather_chunk(count: int, module: ir.Module, words: Sequence[str], registers: calls.Registers) -> ir.Function:
    """`chunk(job, index)`: an even share of the arrays."""
    del registers
    builder, job, chunk = calls.start_chunk(module, words)
    out = job.floats(builder, "out")
    floats, room, chunks = (job.read(builder, name) for name in ("floats", "room", "chunks"))
    begin, end = calls.share(builder, I64(count), chunk, chunks)
    with calls.loop(builder, begin, end, 1) as array:
        _copy(builder, builder.gep(out, [builder.mul(array, room)]), job.floats(builder, "in0", array), floats)
    builder.ret_void()
    return builder.function


def _add_scatter_chunk(count: int, module: ir.Module, words: Sequence[str], registers: calls.Registers) -> ir.Function:
    """`chunk(job, index)`: an even share of all rows of all arrays."""
    del registers
    builder, job, chunk = calls.start_chunk(module, words)
    gathered, starts = job.floats(builder, "gathered"), builder.inttoptr(job.read(builder, "start"), I32.as_pointer())
    tokens = builder.load(builder.inttoptr(job.read(builder, "tokens"), I32.as_pointer()))
    tokens = builder.sext(tokens, I64)
    batch, heads, channels, room, slots, chunks = (
        job.read(builder, name) for name in ("batch", "heads", "channels", "room", "slots", "chunks")
    )
    last_start, per_head = builder.sub(slots, tokens), builder.mul(channels, tokens)
    begin, end = calls.share(builder, builder.mul(batch, I64(count)), chunk, chunks)
    with calls.loop(builder, begin, end, 1) as piece:
        array, row = builder.sdiv(piece, batch), builder.srem(piece, batch)
        start = builder.sext(builder.load(builder.gep(starts, [row])), I64)
        for limit, comparison in ((last_start, ">"), (I64(0), "<")):
            start = builder.select(builder.icmp_signed(comparison, start, limit), limit, start)
        source = builder.gep(gathered, [builder.mul(array, room)])
        with calls.loop(builder, I64(0), heads, 1) as head:
            place = builder.add(builder.mul(row, heads), head)
            entries = builder.gep(source, [builder.mul(place, per_head)])
            cache = builder.gep(job.floats(builder, "out0", array), [builder.mul(place, builder.mul(channels, slots))])
            with builder.if_else(builder.icmp_signed("<", array, I64(count // 2))) as (is_keys, is_values):
                with is_keys, calls.loop(builder, I64(0), channels, 1) as channel:
                    target = builder.gep(cache, [builder.add(builder.mul(channel, slots), start)])
                    with calls.loop(builder, I64(0), tokens, 1) as token:
                        entry = builder.load(builder.gep(entries, [builder.add(builder.mul(channel, tokens), token)]))
                        builder.store(entry, builder.gep(target, [token]))
                with is_values:
                    _copy(builder, builder.gep(cache, [builder.mul(start, channels)]), entries, per_head)
    builder.ret_void()
    return builder.function
