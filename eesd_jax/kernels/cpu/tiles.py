"""Rows times a matrix of 4- or 8-bit codes on a CPU with tiles (Intel AMX): products of small integers, 16 outputs and 16 rows at a time.

Groups are multiplied as `groups.py` says; five rows take less time than memory needs to bring the codes.

Axes: R rows, I inputs, O outputs, G groups of 32 inputs. A slab is up to 16 rows.
"""

import ctypes
import functools
import platform
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from llvmlite import ir

from eesd_jax.kernels.cpu import calls
from eesd_jax.kernels.cpu.calls import BYTES, FLOATS, I32, I64
from eesd_jax.kernels.cpu.groups import (
    BLOCK_OUTPUTS,
    DIGITS,
    I8,
    INTEGERS,
    SLAB_ROWS,
    VECTOR,
    Kind,
    add_quantize,
    ask,
    constant,
    load,
    numbers,
    scaled,
    slab,
    slabs,
    store,
    unpack,
)
from eesd_jax.model.stored import GROUP

TARGET = "eesd_jax_rows_by_tiles"
_QUANTIZE = "eesd_jax_quantize_for_tiles"
_ROWS_AT_ONCE = (1, 2, 3, 4, 5, 6, 8, 10, SLAB_ROWS)  # code is written for; other numbers of rows are padded
_CHUNKS_PER_CORE = 2
_PIECE = 8  # groups whose codes are unpacked before they are used: a tile cannot be loaded from what was stored just now
_PERMISSION, _TILE_DATA = (158, 0x1023), 18  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)


@functools.cache
def available() -> bool:
    """Whether this processor multiplies by tiles, and the system lets it."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    if not calls.has_features("amx-int8", "avx512f", "avx512bw", "f16c"):
        return False
    # A process has to ask, once, for registers of that size.
    return ctypes.CDLL(None).syscall(*_PERMISSION, _TILE_DATA) == 0


def multiply(x_RxI: jax.Array, kind: Kind, weight: Sequence[jax.Array]) -> jax.Array:
    """Float32 [R, I] times the [O, I] that `integers.Integers` stand for, of which `weight` is what there is, giving [R, O]."""
    (rows, inputs), blocks = x_RxI.shape, weight[0].shape[0]
    count = -(-rows // SLAB_ROWS)
    _register_quantize()
    digits = jax.ShapeDtypeStruct((count, DIGITS * SLAB_ROWS * inputs), jnp.int8)
    per_group = jax.ShapeDtypeStruct((count * SLAB_ROWS, inputs // GROUP), jnp.float32)
    integers = jax.ffi.ffi_call(_QUANTIZE, (digits, per_group, per_group))(x_RxI, **calls.split(count, 1))
    target = f"{TARGET}_{kind.name}"
    _register(target, kind)
    result = jax.ShapeDtypeStruct((rows, blocks * BLOCK_OUTPUTS), jnp.float32)
    return jax.ffi.ffi_call(target, result)(*integers, *weight, **calls.split(blocks, _CHUNKS_PER_CORE))


@functools.cache
def _register_quantize() -> None:
    results = (("digits",), ("scale",), ("sum",))
    calls.register(_QUANTIZE, (("x", "rows", "inputs"),), results, ("chunks", "helpers"), _add_quantize_chunk)


@functools.cache
def _register(target: str, kind: Kind) -> None:
    arguments = (("digits",), ("x_scale",), ("x_sum",), *kind.buffers)
    calls.register(target, arguments, (("out", "rows"),), ("chunks", "helpers"), functools.partial(_add_chunk, kind))


def _tile_config(module: ir.Module, rows: int) -> ir.GlobalVariable:
    """What the tiles 0 to 6 are: C, A and B of `_add_blocks`."""
    _, c_rows = _parts(rows)
    config = np.zeros(64, np.uint8)
    config[0] = 1
    columns, counts = config[16:48].view(np.uint16), config[48:]
    columns[:3], counts[:3] = 64, c_rows
    columns[3:6], counts[3:6] = GROUP, c_rows
    columns[6], counts[6] = 64, GROUP // 4
    kind = ir.ArrayType(I8, 64)
    variable = ir.GlobalVariable(module, kind, f"tiles_of_{rows}")
    variable.initializer, variable.global_constant, variable.linkage = ir.Constant(kind, bytearray(config.tobytes())), True, "internal"
    variable.align = 64
    return variable


def _parts(rows: int) -> tuple[int, int]:
    """Into how many tiles the digits of so many rows go, and how many to each."""
    parts = -(-DIGITS * rows // 16)
    return parts, DIGITS * rows // parts


def _add_blocks(module: ir.Module, kind: Kind, rows: int) -> ir.Function:
    """`blocks(digits, scale, sum, groups, codes, weight scale, weight offset, first, end, out, outputs, valid)`.

    Writes the products of `rows` rows, whose digits lie as `quantize` leaves them with `rows` rows between one place and the next, with the
    outputs of blocks first to end - 1 into the first `valid` rows of `out`.
    """
    arguments = (BYTES, FLOATS, FLOATS, I64, BYTES, BYTES, BYTES, I64, I64, FLOATS, I64, I64)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), f"blocks_of_{rows}")
    function.linkage = "internal"
    digits, x_scale, x_sum, groups, codes, w_scale, w_offset, first, end, out, outputs, valid = function.args
    w_numbers = (w_scale, w_offset)[: len(kind.halves)]

    def tile(name: str, *arguments: ir.Type) -> ir.Function:
        return calls.external(module, f"llvm.x86.{name}", ir.VoidType(), *arguments)

    load_tile, store_tile = tile("tileloadd64", I8, BYTES, I64), tile("tilestored64", I8, BYTES, I64)
    multiply, clear = tile("tdpbssd", I8, I8, I8), tile("tilezero", I8)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    unpacked = builder.alloca(I8, size=I64(_PIECE * GROUP * BLOCK_OUTPUTS))
    sums = builder.alloca(I32, size=I64(DIGITS * rows * BLOCK_OUTPUTS))
    unpacked.align = sums.align = 64
    builder.call(tile("ldtilecfg", BYTES), (builder.bitcast(_tile_config(module, rows), BYTES),))
    inputs = builder.mul(groups, I64(GROUP))
    parts, part_rows = _parts(rows)

    def step(block: ir.Value, start: ir.Value, group: ir.Value, totals: Sequence[ir.Value]) -> Sequence[ir.Value]:
        place = builder.add(builder.mul(block, groups), group)
        ask(builder, kind, codes, w_numbers, place)
        if kind.nibbles:
            weights = builder.gep(unpacked, [builder.mul(builder.sub(group, start), I64(GROUP * BLOCK_OUTPUTS))])
        else:
            weights = builder.gep(codes, [builder.mul(place, I64(kind.group_bytes))])
        builder.call(load_tile, (I8(6), weights, I64(64)))
        for part in range(parts):
            begin = builder.add(builder.mul(inputs, I64(part * part_rows)), builder.mul(group, I64(GROUP)))
            builder.call(clear, (I8(part),))
            builder.call(load_tile, (I8(3 + part), builder.gep(digits, [begin]), inputs))
            builder.call(multiply, (I8(part), I8(3 + part), I8(6)))
            address = builder.gep(sums, [I64(part * part_rows * BLOCK_OUTPUTS)])
            builder.call(store_tile, (I8(part), builder.bitcast(address, BYTES), I64(4 * BLOCK_OUTPUTS)))
        scale, offset = (*(numbers(builder, *of, place) for of in zip(w_numbers, kind.halves, strict=True)), None)[:2]
        following = []
        for row, before in enumerate(totals):
            places = [I64((digit * rows + row) * BLOCK_OUTPUTS) for digit in range(DIGITS)]
            of_digits = [load(builder, builder.gep(sums, [at]), INTEGERS) for at in places]
            here = builder.add(builder.mul(groups, I64(row)), group)
            addresses = [builder.gep(array, [here]) for array in (x_scale, x_sum)]
            following.append(scaled(builder, before, of_digits, scale, offset, *addresses))
        return following

    def piece(block: ir.Value, start: ir.Value, totals: Sequence[ir.Value]) -> Sequence[ir.Value]:
        end = builder.add(start, I64(_PIECE))
        end = builder.select(builder.icmp_signed("<", end, groups), end, groups)
        if kind.nibbles:
            with calls.loop(builder, start, end, 1) as group:
                target = builder.gep(unpacked, [builder.mul(builder.sub(group, start), I64(GROUP * BLOCK_OUTPUTS))])
                place = builder.add(builder.mul(block, groups), group)
                vectors = unpack(builder, kind, builder.gep(codes, [builder.mul(place, I64(kind.group_bytes))]))
                for i, vector in enumerate(vectors):
                    store(builder, vector, builder.gep(target, [I64(64 * i)]))
        return calls.fold(builder, start, end, 1, totals, functools.partial(step, block, start))

    with calls.loop(builder, first, end, 1) as block:
        zero = constant(0.0, VECTOR)
        totals = calls.fold(builder, I64(0), groups, _PIECE, [zero] * rows, functools.partial(piece, block))
        for row, value in enumerate(totals):
            with builder.if_then(builder.icmp_signed("<", I64(row), valid)):
                address = builder.add(builder.mul(outputs, I64(row)), builder.mul(block, I64(BLOCK_OUTPUTS)))
                store(builder, value, builder.gep(out, [address]))
    builder.call(tile("tilerelease"), ())
    builder.ret_void()
    return function


def _room(builder: ir.IRBuilder, valid: ir.Value) -> ir.Value:
    """For how many rows code is run, of which some are valid."""
    room = I64(SLAB_ROWS)
    for count in reversed(_ROWS_AT_ONCE):
        room = builder.select(builder.icmp_signed("<=", valid, I64(count)), I64(count), room)
    return room


def _add_quantize_chunk(module: ir.Module, words: Sequence[str], registers: calls.Registers) -> ir.Function:
    """`chunk(job, index)`: an even share of the slabs."""
    del registers
    quantize = add_quantize(module)
    builder, job, chunk = calls.start_chunk(module, words)
    x = job.floats(builder, "x")
    digits, *per_group = (builder.inttoptr(job.read(builder, name), BYTES) for name in ("digits", "scale", "sum"))
    rows, inputs, chunks = (job.read(builder, name) for name in ("rows", "inputs", "chunks"))
    groups = builder.sdiv(inputs, I64(GROUP))
    begin, end = calls.share(builder, slabs(builder, rows), chunk, chunks)
    with calls.loop(builder, begin, end, 1) as index:
        first, valid = slab(builder, rows, index)
        of_slab = builder.gep(digits, [builder.mul(first, builder.mul(inputs, I64(DIGITS)))])
        step = builder.mul(inputs, _room(builder, valid))
        with calls.loop(builder, I64(0), valid, 1) as i:
            row = builder.add(first, i)
            here, target = builder.gep(x, [builder.mul(row, inputs)]), builder.gep(of_slab, [builder.mul(i, inputs)])
            of_row = [builder.gep(array, [builder.mul(builder.mul(row, groups), I64(4))]) for array in per_group]
            builder.call(quantize, (here, groups, target, step, I64(GROUP), *of_row, I64(4)))
    builder.ret_void()
    return builder.function


def _add_chunk(kind: Kind, module: ir.Module, words: Sequence[str], registers: calls.Registers) -> ir.Function:
    """`chunk(job, index)`: an even share of the blocks of outputs."""
    del registers
    blocks_of = {rows: _add_blocks(module, kind, rows) for rows in _ROWS_AT_ONCE}
    builder, job, chunk = calls.start_chunk(module, words)
    x_scale, x_sum, out = (job.floats(builder, name) for name in ("x_scale", "x_sum", "out"))
    digits, *weight = (builder.inttoptr(job.read(builder, name), BYTES) for name in ("digits", *kind.fields))
    weight += [ir.Constant(BYTES, None)] * (3 - len(weight))
    rows, groups, blocks, chunks = (job.read(builder, name) for name in ("rows", "groups", "blocks", "chunks"))
    inputs, outputs = builder.mul(groups, I64(GROUP)), builder.mul(blocks, I64(BLOCK_OUTPUTS))
    begin, end = calls.share(builder, blocks, chunk, chunks)
    with calls.loop(builder, I64(0), slabs(builder, rows), 1) as index:
        first, valid = slab(builder, rows, index)
        room = _room(builder, valid)
        of_slab = builder.gep(digits, [builder.mul(first, builder.mul(inputs, I64(DIGITS)))])
        scale, total = (builder.gep(array, [builder.mul(first, groups)]) for array in (x_scale, x_sum))
        target = builder.gep(out, [builder.mul(first, outputs)])
        for count, function_of in blocks_of.items():
            with builder.if_then(builder.icmp_signed("==", room, I64(count))):
                builder.call(function_of, (of_slab, scale, total, groups, *weight, begin, end, target, outputs, valid))
    builder.ret_void()
    return builder.function
