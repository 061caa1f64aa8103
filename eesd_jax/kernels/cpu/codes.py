"""A few rows times a matrix on CPU, where the matrix lies in memory as the 4- or 8-bit codes that its file stores.

Decoding is as fast as memory gives the weights, and codes are a quarter to a sixth of the float32 numbers that they stand for. The
numbers are made of them in registers, and multiplied and summed as `rows.py` does it: results are those of the float32 matrix to the bit.

Axes: R rows, I inputs, O outputs, G groups of 32 inputs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from llvmlite import ir

from eesd_jax.kernels.cpu import calls
from eesd_jax.kernels.cpu import rows as cpu_rows
from eesd_jax.kernels.cpu.calls import BYTES, F32, FLOATS, I32, I64
from eesd_jax.kernels.cpu.rows import BLOCK_OUTPUTS
from eesd_jax.model.stored import GROUP, Codes

TARGET = "eesd_jax_rows_by_codes"
# With more rows than registers hold, four outputs' weights are written out on the thread's stack.
_MAX_INPUTS = 16384
_AHEAD = 2048  # bytes of codes that memory is asked for early


def usable(rows: int, weight: Codes) -> bool:
    """Whether `rows_by_codes` can take this product: few rows, and sizes that divide evenly."""
    if rows > cpu_rows.MAX_ROWS:
        return False
    outputs, width = weight.codes.shape
    inputs = width * _kind(weight).codes_a_unit
    return outputs % BLOCK_OUTPUTS == 0 and inputs % GROUP == 0 and inputs <= _MAX_INPUTS


def rows_by_codes(x_RxI: jax.Array, weight: Codes) -> jax.Array:
    """Float32 [R, I] times the [O, I] that the codes stand for, giving [R, O]; see `usable`."""
    kind = _kind(weight)
    target = f"{TARGET}_{kind.name}"
    _register(target, kind)
    outputs = weight.codes.shape[0]
    result = jax.ShapeDtypeStruct((x_RxI.shape[0], outputs), jnp.float32)
    arrays = [array for array in weight if array is not None]
    return jax.ffi.ffi_call(target, result)(x_RxI, *arrays, **cpu_rows.split(outputs))


class _Place(NamedTuple):
    """Addresses in code that is being written. codes: bytes. scale, offset: floats, None where the kind has none."""

    codes: ir.Value
    scale: ir.Value
    offset: ir.Value | None


class _Kind(NamedTuple):
    """How weights are stored.

    fields: those of `Codes` that there are. group_bytes: codes of a group. codes_a_unit: codes of one item of the array. decode: writes
    code that gives the numbers of a group, as vectors: (module, builder, lanes, place of the group) -> vectors.
    """

    name: str
    fields: tuple[str, ...]
    group_bytes: int
    codes_a_unit: int
    decode: Callable[[ir.Module, ir.IRBuilder, int, _Place], list[ir.Value]]


def _kind(weight: Codes) -> _Kind:
    return _BYTES if weight.offset is None else _NIBBLES


def _load(builder: ir.IRBuilder, address: ir.Value, item: ir.Type, lanes: int, i: int) -> ir.Value:
    """The items i to i + lanes - 1 of an array."""
    items = builder.bitcast(address, item.as_pointer())
    return builder.load(builder.bitcast(builder.gep(items, [I64(i)]), ir.VectorType(item, lanes).as_pointer()), align=1)


def _decode_nibbles(module: ir.Module, builder: ir.IRBuilder, lanes: int, place: _Place) -> list[ir.Value]:
    integers, floats = ir.VectorType(I32, lanes), ir.VectorType(F32, lanes)
    low_bits, shift = (ir.Constant(integers, [value] * lanes) for value in (15, 4))
    scale, offset = (calls.splat(builder, builder.load(address), lanes) for address in (place.scale, place.offset))

    def number(codes: ir.Value) -> ir.Value:
        return builder.fadd(builder.fmul(builder.sitofp(codes, floats), scale), offset)

    half = GROUP // 2
    bytes_of = (_load(builder, place.codes, ir.IntType(8), lanes, i) for i in range(0, half, lanes))
    pairs = [builder.zext(part, integers) for part in bytes_of]
    if lanes == half:  # the 16 numbers of the group in one register, of which a code's low four bits choose
        permute = calls.external(module, "llvm.x86.avx512.permvar.sf.512", floats, floats, integers)
        numbers = number(ir.Constant(integers, list(range(half))))
        return [builder.call(permute, (numbers, codes)) for codes in (pairs[0], builder.lshr(pairs[0], shift))]
    return [number(builder.and_(pair, low_bits)) for pair in pairs] + [number(builder.lshr(pair, shift)) for pair in pairs]


def _decode_bytes(module: ir.Module, builder: ir.IRBuilder, lanes: int, place: _Place) -> list[ir.Value]:
    del module
    integers, floats = ir.VectorType(I32, lanes), ir.VectorType(F32, lanes)
    scale = calls.splat(builder, builder.load(place.scale), lanes)
    codes = [_load(builder, place.codes, ir.IntType(8), lanes, i) for i in range(0, GROUP, lanes)]
    return [builder.fmul(builder.sitofp(builder.sext(part, integers), floats), scale) for part in codes]


_NIBBLES = _Kind("nibbles", ("codes", "scale", "offset"), GROUP // 2, 2, _decode_nibbles)
_BYTES = _Kind("bytes", ("codes", "scale"), GROUP, 1, _decode_bytes)


@functools.cache
def _register(target: str, kind: _Kind) -> None:
    arguments = (("x", "rows", "inputs"), *((name, "outputs") if name == "codes" else (name,) for name in kind.fields))
    add = functools.partial(_add_chunk, kind)
    calls.register(target, arguments, (("out",),), ("chunks", "helpers"), add)


def _group_place(builder: ir.IRBuilder, kind: _Kind, matrix: Sequence[ir.Value], group: ir.Value) -> _Place:
    """Where that group of a matrix lies, whose fields begin at those addresses; asks memory for a later one."""
    codes = builder.gep(matrix[0], [builder.mul(group, I64(kind.group_bytes))])
    prefetch = calls.external(builder.module, "llvm.prefetch.p0i8", ir.VoidType(), BYTES, I32, I32, I32)
    builder.call(prefetch, (builder.gep(codes, [I64(_AHEAD)]), I32(0), I32(2), I32(1)))
    rest = [builder.gep(array, [group]) for array in matrix[1:]]
    return _Place(codes, *rest, *[None] * (2 - len(rest)))


def _add_unpack(module: ir.Module, kind: _Kind, lanes: int) -> ir.Function:
    """`unpack(out, groups, codes, ...)`: the float32 numbers of so many groups."""
    arguments = (FLOATS, I64, BYTES, *[FLOATS] * (len(kind.fields) - 1))
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), "unpack")
    function.linkage = "internal"
    out, groups, *matrix = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    with calls.loop(builder, I64(0), groups, 1) as group:
        vectors = kind.decode(module, builder, lanes, _group_place(builder, kind, matrix, group))
        for i, vector in enumerate(vectors):
            address = builder.gep(out, [builder.add(builder.mul(group, I64(GROUP)), I64(i * lanes))])
            builder.store(vector, builder.bitcast(address, vector.type.as_pointer()), align=4)
    builder.ret_void()
    return function


def _add_direct(module: ir.Module, kind: _Kind, rows: int, lanes: int) -> ir.Function:
    """`direct(x, out, groups, outputs, codes, ...)`: `rows` rows of x times `BLOCK_OUTPUTS` rows of codes, from register to register."""
    arguments = (FLOATS, FLOATS, I64, I64, BYTES, *[FLOATS] * (len(kind.fields) - 1))
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), f"direct_{rows}")
    function.linkage = "internal"
    x, out, groups, outputs, *matrix = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    inputs = builder.mul(groups, I64(GROUP))

    def values(group: ir.Value, i: int) -> list[ir.Value]:
        starts = [builder.add(builder.mul(inputs, I64(r)), builder.mul(group, I64(GROUP))) for r in range(rows)]
        return [_load(builder, builder.gep(x, [start]), F32, lanes, i * lanes) for start in starts]

    def numbers(group: ir.Value) -> list[list[ir.Value]]:
        places = [builder.add(builder.mul(groups, I64(o)), group) for o in range(BLOCK_OUTPUTS)]
        return [kind.decode(module, builder, lanes, _group_place(builder, kind, matrix, place)) for place in places]

    def step(group: ir.Value, sums: Sequence[ir.Value]) -> Sequence[ir.Value]:
        weights = numbers(group)
        for i in range(GROUP // lanes):
            sums = cpu_rows.multiply(module, builder, values(group, i), [of_output[i] for of_output in weights], sums)
        return sums

    zero = ir.Constant(ir.VectorType(F32, lanes), [0.0] * lanes)
    sums = calls.fold(builder, I64(0), groups, 1, [zero] * (rows * BLOCK_OUTPUTS), step)
    cpu_rows.store_sums(module, builder, sums, out, outputs)
    builder.ret_void()
    return function


def _add_chunk(kind: _Kind, module: ir.Module, words: Sequence[str], registers: calls.Registers) -> ir.Function:
    """`chunk(job, index)`: an even share of the outputs."""
    lanes, max_rows = registers
    unpack = _add_unpack(module, kind, lanes)
    direct = {rows: _add_direct(module, kind, rows, lanes) for rows in range(1, max_rows + 1)}
    blocks = {rows: cpu_rows.add_block(module, rows, lanes, ahead=0) for rows in range(1, max_rows + 1)}
    builder, job, chunk = calls.start_chunk(module, words)
    x, out = job.floats(builder, "x"), job.floats(builder, "out")
    rows, inputs, outputs = (job.read(builder, name) for name in ("rows", "inputs", "outputs"))
    matrix = [builder.inttoptr(job.read(builder, name), BYTES if name == "codes" else FLOATS) for name in kind.fields]
    groups = builder.sdiv(inputs, I64(GROUP))
    few = builder.icmp_signed("<=", rows, I64(max_rows))
    scratch = builder.alloca(F32, size=builder.select(few, I64(0), builder.mul(inputs, I64(BLOCK_OUTPUTS))))
    scratch.align = 64
    first, end = cpu_rows.share(builder, job, chunk, outputs)
    with calls.loop(builder, first, end, BLOCK_OUTPUTS) as o:
        group = builder.mul(o, groups)
        here = [builder.gep(matrix[0], [builder.mul(group, I64(kind.group_bytes))]), *(builder.gep(array, [group]) for array in matrix[1:])]

        def run(rows_at_once: int, row: ir.Value) -> None:
            x_block = builder.gep(x, [builder.mul(row, inputs)])
            out_block = builder.gep(out, [builder.add(builder.mul(row, outputs), o)])
            with builder.if_else(few) as (then, otherwise):
                with then:
                    builder.call(direct[rows_at_once], (x_block, out_block, groups, outputs, *here))
                with otherwise:
                    builder.call(blocks[rows_at_once], (x_block, scratch, out_block, inputs, outputs, scratch))

        with builder.if_then(builder.not_(few)):
            builder.call(unpack, (scratch, builder.mul(groups, I64(BLOCK_OUTPUTS)), *here))
        cpu_rows.sweep(builder, rows, max_rows, run)
    builder.ret_void()
    return builder.function
