"""Attention over the key/value cache on CPU: one kernel in place of a dozen small operations, for one new token as for hundreds.

It reads the valid part of the cache only, whatever the capacity, and sums everything in the order of positions, wherever the boundary
between cached and new tokens lies: so a pass of several tokens gives the very numbers of passes of one token each.

Axes: B rows, T new tokens, N heads, K key/value heads, H channels of a head, S slots of the cache. The N / K queries of a token that share
a key/value head, and those of all new tokens, are the queries of one problem; a chunk of work is a few of them.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from llvmlite import ir

from eesd_jax.kernels.cpu import calls
from eesd_jax.kernels.cpu.calls import BYTES, F32, FLOATS, I32, I64
from eesd_jax.model.ops import Visible

TARGET = "eesd_jax_cached_attention"
# Vectors begin at multiples of this many positions: a position has the same lane in every pass.
_LANES = 16
_VECTORS = 4
# Multiplications below which waking another thread costs more than it brings.
_SHARED = 100_000
# How far ahead memory is asked for: channels of keys, each of which lies elsewhere, and positions of values.
_AHEAD = 8
_ARGUMENTS = (
    ("q", "batch", "tokens", "heads", "channels"),
    ("new_k", "new_k_batch", "kv_heads"),
    ("new_v",),
    ("old_k", "old_k_batch", "old_k_heads", "old_k_channels", "slots"),
    ("old_v",),
    ("start",),
)
# exp(x) = 2^n exp(r), n integer; coefficients of exp(r) for |r| <= ln(2) / 2 (Cephes library, single precision).
_LOG2_E, _LN_2 = 1.44269504088896341, (0.693359375, -2.12194440e-4)
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LEAST = -87.0  # exp of less is 0 here


def accepts(
    q_BxTxNxH: jax.Array,
    new_k: jax.Array,
    new_v: jax.Array,
    cached_k: jax.Array,
    cached_v: jax.Array,
    start_B: jax.Array,
    visible: Visible,
) -> bool:
    """Whether `cached_attention` can take this: float32, sizes that divide evenly, no mask, and a window known beforehand."""
    del new_k, new_v, cached_v, start_B
    fits = q_BxTxNxH.shape[3] % _LANES == 0 and cached_k.shape[3] % _LANES == 0
    static = visible.window is None or isinstance(visible.window, int)
    return visible.mask is None and fits and static and {q_BxTxNxH.dtype, cached_k.dtype} == {jnp.dtype("float32")}


def cached_attention(
    q_BxTxNxH: jax.Array,
    new_k: jax.Array,
    new_v: jax.Array,
    cached_k: jax.Array,
    cached_v: jax.Array,
    start_B: jax.Array,
    visible: Visible,
) -> jax.Array:
    """`ops.cached_attention` of what `accepts` accepts, float32 [B, T, N, H]. Not differentiable."""
    _register(TARGET)
    batch, tokens, heads, channels = q_BxTxNxH.shape
    kv_heads, slots = cached_k.shape[1], cached_k.shape[3]
    chunks = batch * kv_heads * -(-tokens * heads // (kv_heads * calls.registers().rows))
    helpers = calls.cores() - 1 if 2 * batch * tokens * heads * channels * slots > _SHARED else 0
    sizes = {"chunks": chunks, "helpers": min(helpers, chunks - 1), "window": visible.window or 0}
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(q_BxTxNxH.shape, jnp.float32))
    return call(q_BxTxNxH, new_k, new_v, cached_k, cached_v, start_B, **{name: np.int64(size) for name, size in sizes.items()})


@functools.cache
def _register(target: str) -> None:
    calls.register(target, _ARGUMENTS, (("out",),), ("chunks", "helpers", "window"), _add_chunk)


def _add_chunk(module: ir.Module, words: Sequence[str], registers: calls.Registers) -> ir.Function:
    """`chunk(job, index)`: a few queries of one row and key/value head."""
    solvers = {count: _add_solver(module, words, registers.lanes, count) for count in range(1, registers.rows + 1)}
    builder, job, index = calls.start_chunk(module, words)
    kv_heads, heads, tokens = (job.read(builder, name) for name in ("kv_heads", "heads", "tokens"))
    queries = builder.mul(tokens, builder.sdiv(heads, kv_heads))
    groups = builder.sdiv(builder.add(queries, I64(registers.rows - 1)), I64(registers.rows))
    problem, group = builder.sdiv(index, groups), builder.srem(index, groups)  # b * K + k, and which share of its queries
    first, end = calls.share(builder, queries, group, groups)
    for count, solver in solvers.items():
        with builder.if_then(builder.icmp_signed("==", builder.sub(end, first), I64(count))):
            builder.call(solver, (job.address, problem, first))
    builder.ret_void()
    return builder.function


def _add_solver(module: ir.Module, words: Sequence[str], lanes: int, count: int) -> ir.Function:
    """`solve_COUNT(job, problem, first)`: the queries first, ..., first + count - 1 of a problem."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), (BYTES, I64, I64)), f"solve_{count}")
    function.linkage = "internal"
    address, problem, first = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    _Solver(module, builder, calls.Job(words, address), lanes, count).solve(problem, first)
    builder.ret_void()
    return function


class _Solver:
    """Writes the code of `solve_COUNT`. Scores, and then weights, lie in a buffer of one row a query, from position `origin` on."""

    def __init__(self, module: ir.Module, builder: ir.IRBuilder, job: calls.Job, lanes: int, count: int):
        self.module, self.builder, self.job, self.lanes, self.count = module, builder, job, lanes, count
        self.vector = ir.VectorType(F32, lanes)
        self.fma = calls.external(module, f"llvm.fma.v{lanes}f32", *[self.vector] * 4)

    def solve(self, problem: ir.Value, first: ir.Value) -> None:
        b, job, lanes = self.builder, self.job, self.lanes
        tokens, heads, kv_heads, channels, slots, window = (
            job.read(b, name) for name in ("tokens", "heads", "kv_heads", "channels", "slots", "window")
        )
        row, kv_head, group = b.sdiv(problem, kv_heads), b.srem(problem, kv_heads), b.sdiv(heads, kv_heads)
        start_32 = b.load(b.gep(b.bitcast(job.floats(b, "start"), I32.as_pointer()), [row]))
        start = b.sext(start_32, I64)

        # Of each query: which token it is of, where its channels are, and the positions [low, high) that it sees.
        token, offset, low, high = [], [], [], []
        for i in range(self.count):
            query = b.add(first, I64(i))
            token.append(b.sdiv(query, group))
            head = b.add(b.mul(kv_head, group), b.srem(query, group))
            offset.append(b.mul(b.add(b.mul(b.add(b.mul(row, tokens), token[i]), heads), head), channels))
            high.append(b.add(b.add(start, token[i]), I64(1)))
            behind = b.sub(high[i], window)
            seen = b.and_(b.icmp_signed(">", window, I64(0)), b.icmp_signed(">", behind, I64(0)))
            low.append(b.select(seen, behind, I64(0)))
        new_tokens = b.add(token[-1], I64(1))  # that the last query sees
        from_position = b.select(b.icmp_signed("<", low[0], start), low[0], start)
        origin = b.and_(from_position, I64(-_LANES))
        end = b.and_(b.add(high[-1], I64(_LANES - 1)), I64(-_LANES))
        size = b.sub(end, origin)
        # One vector more: the last new scores are written a vector at a time.
        stride = b.add(size, I64(_LANES))
        malloc = calls.external(self.module, "malloc", BYTES, I64)
        free = calls.external(self.module, "free", ir.VoidType(), BYTES)
        memory = b.call(malloc, (b.mul(stride, I64(4 * self.count)),))
        scores = [b.gep(b.bitcast(memory, FLOATS), [b.mul(stride, I64(i))]) for i in range(self.count)]

        q = [b.gep(job.floats(b, "q"), [offset[i]]) for i in range(self.count)]
        out = [b.gep(job.floats(b, "out"), [offset[i]]) for i in range(self.count)]
        old_k = b.gep(job.floats(b, "old_k"), [b.mul(b.mul(problem, channels), slots)])
        old_v = b.gep(job.floats(b, "old_v"), [b.mul(b.mul(problem, channels), slots)])
        new_k = b.gep(job.floats(b, "new_k"), [b.mul(b.mul(problem, channels), tokens)])
        new_v = b.gep(job.floats(b, "new_v"), [b.mul(b.mul(problem, channels), tokens)])

        # Scores of cached positions, by whole vectors: what comes too much is overwritten or masked below.
        wide = lanes * _VECTORS
        cached_end = b.and_(b.add(start, I64(lanes - 1)), I64(-lanes))
        blocks = b.mul(b.sdiv(b.sub(cached_end, origin), I64(wide)), I64(wide))
        middle = b.add(origin, b.select(b.icmp_signed(">", blocks, I64(0)), blocks, I64(0)))
        for vectors, begin, stop in ((_VECTORS, origin, middle), (1, middle, cached_end)):
            with calls.loop(b, begin, stop, vectors * lanes) as position:
                keys = b.gep(old_k, [position])
                places = [b.gep(row_scores, [b.sub(position, origin)]) for row_scores in scores]
                self.add_scores(q, keys, slots, channels, vectors, places, None)
        # Scores of the new tokens; theirs are the last keys, so nothing beyond them may be read.
        with calls.loop(b, I64(0), new_tokens, lanes) as j:
            places = [b.gep(row_scores, [b.sub(b.add(start, j), origin)]) for row_scores in scores]
            self.add_scores(q, b.gep(new_k, [j]), tokens, channels, 1, places, b.sub(tokens, j))

        totals = [self.add_softmax(scores[i], origin, size, low[i], high[i]) for i in range(self.count)]

        blocks = b.mul(b.sdiv(channels, I64(wide)), I64(wide))
        for vectors, begin, stop in ((_VECTORS, I64(0), blocks), (1, blocks, channels)):
            with calls.loop(b, begin, stop, vectors * lanes) as channel:
                sums = [ir.Constant(self.vector, [0.0] * lanes)] * (self.count * vectors)
                shift = b.sub(I64(0), origin)
                sums = self.add_values(scores, shift, b.gep(old_v, [channel]), channels, from_position, start, vectors, sums)
                shift = b.sub(start, origin)
                sums = self.add_values(scores, shift, b.gep(new_v, [channel]), channels, I64(0), new_tokens, vectors, sums)
                for i, value in enumerate(sums):
                    place = b.gep(out[i // vectors], [b.add(channel, I64(i % vectors * lanes))])
                    self.store(b.fdiv(value, self.splat(totals[i // vectors])), place)
        b.call(free, (memory,))

    def add_scores(
        self,
        q: Sequence[ir.Value],
        keys: ir.Value,
        stride: ir.Value,
        channels: ir.Value,
        vectors: int,
        places: Sequence[ir.Value],
        left: ir.Value | None,
    ) -> None:
        """Products of all queries with the keys of `vectors` vectors of positions, channel after channel; `left`: how many may be read."""
        b = self.builder
        readable = None if left is None else b.icmp_signed("<", self.iota(), self.splat(left))
        zero = ir.Constant(self.vector, [0.0] * self.lanes)

        def multiply(channel: ir.Value, sums: Sequence[ir.Value]) -> list[ir.Value]:
            line = b.gep(keys, [b.mul(channel, stride)])
            loaded = [self.load(b.gep(line, [I64(v * self.lanes)]), readable) for v in range(vectors)]
            self.ask(b.gep(line, [b.mul(I64(_AHEAD), stride)]), vectors)
            values = [self.splat(b.load(b.gep(query, [channel]))) for query in q]
            return [b.call(self.fma, (values[i // vectors], loaded[i % vectors], before)) for i, before in enumerate(sums)]

        sums = calls.fold(b, I64(0), channels, 1, [zero] * (len(q) * vectors), multiply)
        for i, value in enumerate(sums):
            self.store(value, b.gep(places[i // vectors], [I64(i % vectors * self.lanes)]))

    def add_softmax(self, scores: ir.Value, origin: ir.Value, size: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
        """Turns the scores of one query into weights, 0 outside [low, high), and gives their sum."""
        b, lanes = self.builder, self.lanes
        largest = calls.external(self.module, f"llvm.vector.reduce.fmax.v{lanes}f32", F32, self.vector)
        total = calls.external(self.module, f"llvm.vector.reduce.fadd.v{lanes}f32", F32, F32, self.vector)
        lowest = ir.Constant(self.vector, [-float("inf")] * lanes)

        def mask(i: ir.Value, peaks: Sequence[ir.Value]) -> list[ir.Value]:
            position = b.add(self.splat(b.add(origin, i)), self.iota())
            seen = b.and_(b.icmp_signed(">=", position, self.splat(low)), b.icmp_signed("<", position, self.splat(high)))
            value = b.select(seen, self.load(b.gep(scores, [i])), lowest)
            self.store(value, b.gep(scores, [i]))
            return [b.select(b.fcmp_ordered(">", value, peaks[0]), value, peaks[0])]

        (peaks,) = calls.fold(b, I64(0), size, lanes, [lowest], mask)
        peak = self.splat(b.call(largest, (peaks,)))

        def weigh(i: ir.Value, sums: Sequence[ir.Value]) -> list[ir.Value]:
            weight = self.exp(b.fsub(self.load(b.gep(scores, [i])), peak))
            self.store(weight, b.gep(scores, [i]))
            return [b.fadd(sums[0], weight)]

        (sums,) = calls.fold(b, I64(0), size, lanes, [ir.Constant(self.vector, [0.0] * lanes)], weigh)
        return b.call(total, (F32(0.0), sums), fastmath=("reassoc",))

    def add_values(
        self,
        weights: Sequence[ir.Value],
        shift: ir.Value,
        values: ir.Value,
        channels: ir.Value,
        begin: ir.Value,
        stop: ir.Value,
        vectors: int,
        sums: Sequence[ir.Value],
    ) -> list[ir.Value]:
        """Adds weight times value of the positions [begin, stop), one after the other; their weights lie `shift` further."""
        b = self.builder

        def multiply(position: ir.Value, sums: Sequence[ir.Value]) -> list[ir.Value]:
            line = b.gep(values, [b.mul(position, channels)])
            loaded = [self.load(b.gep(line, [I64(v * self.lanes)])) for v in range(vectors)]
            self.ask(b.gep(line, [b.mul(I64(_AHEAD), channels)]), vectors)
            factors = [self.splat(b.load(b.gep(row, [b.add(position, shift)]))) for row in weights]
            return [b.call(self.fma, (factors[i // vectors], loaded[i % vectors], before)) for i, before in enumerate(sums)]

        return calls.fold(b, begin, stop, 1, sums, multiply)

    def exp(self, x: ir.Value) -> ir.Value:
        """The exponential of numbers <= 0, within 2 units in the last place."""
        b, lanes = self.builder, self.lanes
        integers = ir.VectorType(I32, lanes)

        def constant(value: float) -> ir.Constant:
            return ir.Constant(self.vector, [value] * lanes)

        nearest = calls.external(self.module, f"llvm.rint.v{lanes}f32", self.vector, self.vector)
        too_small = b.fcmp_ordered("<", x, constant(_LEAST))
        clamped = b.select(too_small, constant(_LEAST), x)
        n = b.call(nearest, (b.fmul(clamped, constant(_LOG2_E)),))
        r = clamped
        for part in _LN_2:
            r = b.call(self.fma, (n, constant(-part), r))
        series = constant(_EXP[0])
        for coefficient in _EXP[1:]:
            series = b.call(self.fma, (series, r, constant(coefficient)))
        series = b.fadd(b.call(self.fma, (series, b.fmul(r, r), r)), constant(1.0))
        power = b.shl(b.add(b.fptosi(n, integers), ir.Constant(integers, [127] * lanes)), ir.Constant(integers, [23] * lanes))
        return b.select(too_small, constant(0.0), b.fmul(series, b.bitcast(power, self.vector)))

    def splat(self, value: ir.Value) -> ir.Value:
        return calls.splat(self.builder, value, self.lanes)

    def iota(self) -> ir.Constant:
        return ir.Constant(ir.VectorType(I64, self.lanes), list(range(self.lanes)))

    def load(self, address: ir.Value, readable: ir.Value | None = None) -> ir.Value:
        pointer = self.builder.bitcast(address, self.vector.as_pointer())
        if readable is None:
            return self.builder.load(pointer, align=4)
        bits = ir.VectorType(ir.IntType(1), self.lanes)
        masked = calls.external(
            self.module, f"llvm.masked.load.v{self.lanes}f32.p0v{self.lanes}f32", self.vector, pointer.type, I32, bits, self.vector
        )
        return self.builder.call(masked, (pointer, I32(4), readable, ir.Constant(self.vector, [0.0] * self.lanes)))

    def ask(self, address: ir.Value, vectors: int) -> None:
        """Asks memory for vectors that will be loaded soon, or, behind the end of an array, for nothing."""
        prefetch = calls.external(self.module, "llvm.prefetch.p0i8", ir.VoidType(), BYTES, I32, I32, I32)
        for v in range(vectors):
            line = self.builder.bitcast(self.builder.gep(address, [I64(v * self.lanes)]), BYTES)
            self.builder.call(prefetch, (line, I32(0), I32(3), I32(1)))

    def store(self, value: ir.Value, address: ir.Value) -> None:
        self.builder.store(value, self.builder.bitcast(address, self.vector.as_pointer()), align=4)
