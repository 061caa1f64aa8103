"""A few rows times a matrix on CPU, at the speed at which memory gives the matrix.

Decoding multiplies 1 to about 17 rows by every weight. One row XLA's CPU backend multiplies at memory speed (as a batch of products), but
from two rows on it uses a library made for large products, which rearranges the whole matrix first: two rows then cost nearly twice
one, and verifying drafts would cost what it saves. Here every weight is read once, whatever the number of rows, and used for all of them,
and while some weights are multiplied memory brings the next: 9 rows cost little more than one.

Every output is summed in the same order whatever the number of rows, so a pass of several tokens gives the very numbers of passes of one
token each.

Axes: R rows, I inputs, O outputs.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from llvmlite import ir

from eesd_jax.kernels.cpu import calls
from eesd_jax.kernels.cpu.calls import BYTES, F32, FLOATS, I32, I64

# With more rows than this, XLA's own product is as fast.
MAX_ROWS = 64
TARGET = "eesd_jax_rows_by_matrix"
_CHUNKS_PER_CORE = 4
BLOCK_OUTPUTS = 4
_LANES = 16


def usable(rows: int, weight_OxI: jax.Array) -> bool:
    """Whether `rows_by_matrix` can take this product: float32, few rows, and sizes that divide evenly."""
    outputs, inputs = weight_OxI.shape
    return rows <= MAX_ROWS and weight_OxI.dtype == jnp.float32 and outputs % BLOCK_OUTPUTS == 0 and inputs % _LANES == 0


@jax.custom_jvp
def rows_by_matrix(x_RxI: jax.Array, *weights_OxI: jax.Array) -> jax.Array:
    """Float32 [R, I] times one or more [O, I], giving [R, all outputs]; see `usable`. One call for several: each call has its price."""
    target = f"{TARGET}_{len(weights_OxI)}"
    _register(target, len(weights_OxI))
    outputs = sum(weight.shape[0] for weight in weights_OxI)
    result = jax.ShapeDtypeStruct((x_RxI.shape[0], outputs), jnp.float32)
    return jax.ffi.ffi_call(target, result)(x_RxI, *weights_OxI, **split(outputs))


@rows_by_matrix.defjvp
def _rows_by_matrix_jvp(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    (x, *weights), (dx, *dweights) = primals, tangents
    product = functools.partial(jnp.einsum, "ri,oi->ro", precision=jax.lax.Precision.HIGHEST)
    changes = [product(dx, weight) + product(x, dweight) for weight, dweight in zip(weights, dweights, strict=True)]
    return rows_by_matrix(x, *weights), jnp.concatenate(changes, axis=-1)


def split(outputs: int) -> dict[str, np.int64]:
    """How a product of so many outputs is cut: the attributes of its kernel."""
    return calls.split(outputs // BLOCK_OUTPUTS, _CHUNKS_PER_CORE)


@functools.cache
def _register(target: str, weights: int) -> None:
    arguments = (("x", "rows", "inputs"), *((f"w{i}", f"outputs{i}") for i in range(weights)))
    add = functools.partial(_add_chunk, weights)
    calls.register(target, arguments, (("out", "out_rows", "all_outputs"),), ("chunks", "helpers"), add)


def add_block(module: ir.Module, rows: int, lanes: int, ahead: int) -> ir.Function:
    """`block(x, w, out, inputs, outputs, next)`: the products of `rows` rows of x with `BLOCK_OUTPUTS` rows of w.

    On its way it asks memory for `ahead` rows that begin at `next`.
    """
    vector = ir.VectorType(F32, lanes)
    kind = ir.FunctionType(ir.VoidType(), (FLOATS, FLOATS, FLOATS, I64, I64, FLOATS))
    function = ir.Function(module, kind, f"block_of_{rows}_ahead_{ahead}")
    function.linkage = "internal"
    x, w, out, inputs, outputs, following = function.args
    prefetch = calls.external(module, "llvm.prefetch.p0i8", ir.VoidType(), BYTES, I32, I32, I32)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    x_rows = [builder.gep(x, [builder.mul(inputs, I64(r))]) for r in range(rows)]
    w_rows = [builder.gep(w, [builder.mul(inputs, I64(o))]) for o in range(BLOCK_OUTPUTS)]
    next_rows = [builder.gep(following, [builder.mul(inputs, I64(o))]) for o in range(ahead)]

    def load(row: ir.Value, i: ir.Value) -> ir.Value:
        return builder.load(builder.bitcast(builder.gep(row, [i]), vector.as_pointer()), align=4)

    def step(i: ir.Value, sums: Sequence[ir.Value]) -> list[ir.Value]:
        for row in next_rows:  # to read, into the second-level cache, data
            builder.call(prefetch, (builder.bitcast(builder.gep(row, [i]), BYTES), I32(0), I32(2), I32(1)))
        return multiply(module, builder, [load(row, i) for row in x_rows], [load(row, i) for row in w_rows], sums)

    zero = ir.Constant(vector, [0.0] * lanes)
    sums = calls.fold(builder, I64(0), inputs, lanes, [zero] * (rows * BLOCK_OUTPUTS), step)
    store_sums(module, builder, sums, out, outputs)
    builder.ret_void()
    return function


def multiply(
    module: ir.Module, builder: ir.IRBuilder, values: Sequence[ir.Value], weights: Sequence[ir.Value], sums: Sequence[ir.Value]
) -> list[ir.Value]:
    """Vectors of every row times vectors of every output, added to their sums, which are in the order (row, output)."""
    vector = weights[0].type
    fma = calls.external(module, f"llvm.fma.v{vector.count}f32", vector, vector, vector, vector)
    cells = itertools.product(values, weights)
    return [builder.call(fma, (value, weight, before)) for (value, weight), before in zip(cells, sums, strict=True)]


def store_sums(module: ir.Module, builder: ir.IRBuilder, sums: Sequence[ir.Value], out: ir.Value, outputs: ir.Value) -> None:
    """Adds up the lanes of each sum, and writes the block [rows, `BLOCK_OUTPUTS`] into rows of `outputs` floats."""
    vector = sums[0].type
    total = calls.external(module, f"llvm.vector.reduce.fadd.v{vector.count}f32", F32, F32, vector)
    for i, value in enumerate(sums):
        row, output = divmod(i, BLOCK_OUTPUTS)
        address = builder.gep(out, [builder.add(builder.mul(outputs, I64(row)), I64(output))])
        builder.store(builder.call(total, (F32(0.0), value), fastmath=("reassoc",)), address)


def _add_chunk(weights: int, module: ir.Module, words: Sequence[str], registers: calls.Registers) -> ir.Function:
    """`chunk(job, index)`: an even share of the outputs of every weight."""
    lanes, max_rows = registers
    blocks = {(rows, ahead): add_block(module, rows, lanes, ahead) for rows in range(1, max_rows + 1) for ahead in (1, 2, 4)}
    builder, job, chunk = calls.start_chunk(module, words)
    x, out = (job.floats(builder, name) for name in ("x", "out"))
    rows, inputs, all_outputs = (job.read(builder, name) for name in ("rows", "inputs", "all_outputs"))
    # What comes next is spread over the passes: all four rows of w at once, two and two, or one by one.
    one = builder.icmp_signed("<=", rows, I64(max_rows))
    few = builder.icmp_signed("<=", rows, I64(3 * max_rows))
    ahead = builder.select(one, I64(4), builder.select(few, I64(2), I64(1)))

    def multiply_by(w: ir.Value, outputs: ir.Value, out: ir.Value) -> None:
        first, end = share(builder, job, chunk, outputs)
        with calls.loop(builder, first, end, BLOCK_OUTPUTS) as o:
            # Four rows of w stay in the first-level cache while all rows of x pass by; meanwhile the next four come from memory.
            w_block = builder.gep(w, [builder.mul(o, inputs)])
            last = builder.icmp_signed(">=", builder.add(o, I64(BLOCK_OUTPUTS)), end)

            def run(rows_at_once: int, row: ir.Value) -> None:
                x_block = builder.gep(x, [builder.mul(row, inputs)])
                out_block = builder.gep(out, [builder.add(builder.mul(row, all_outputs), o)])
                block = builder.select(one, blocks[rows_at_once, 4], builder.select(few, blocks[rows_at_once, 2], blocks[rows_at_once, 1]))
                skip = builder.mul(ahead, builder.sdiv(row, I64(max_rows)))
                done = builder.or_(last, builder.icmp_signed(">=", skip, I64(BLOCK_OUTPUTS)))
                skip = builder.select(done, I64(0), builder.add(skip, I64(BLOCK_OUTPUTS)))
                following = builder.gep(w_block, [builder.mul(skip, inputs)])
                builder.call(block, (x_block, w_block, out_block, inputs, all_outputs, following))

            sweep(builder, rows, max_rows, run)

    for i in range(weights):
        outputs = job.read(builder, f"outputs{i}")
        multiply_by(job.floats(builder, f"w{i}"), outputs, out)
        out = builder.gep(out, [outputs])
    builder.ret_void()
    return builder.function


def share(builder: ir.IRBuilder, job: calls.Job, chunk: ir.Value, outputs: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The first of so many outputs that is a chunk's, and the first that is no longer its own."""
    blocks = builder.sdiv(outputs, I64(BLOCK_OUTPUTS))
    first, end = calls.share(builder, blocks, chunk, job.read(builder, "chunks"))
    return builder.mul(first, I64(BLOCK_OUTPUTS)), builder.mul(end, I64(BLOCK_OUTPUTS))


def sweep(builder: ir.IRBuilder, rows: ir.Value, max_rows: int, run: Callable[[int, ir.Value], None]) -> None:
    """Code that calls `run(rows at once, first row)` for all rows: as many at once as registers hold, then what is left."""
    whole_rows = builder.mul(builder.sdiv(rows, I64(max_rows)), I64(max_rows))
    remaining = builder.sub(rows, whole_rows)
    with calls.loop(builder, I64(0), whole_rows, max_rows) as row:
        run(max_rows, row)
    for rows_at_once in range(1, max_rows):
        with builder.if_then(builder.icmp_signed("==", remaining, I64(rows_at_once))):
            run(rows_at_once, whole_rows)
