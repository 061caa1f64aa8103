"""Rows times a matrix of 4- or 8-bit codes on a CPU with dot products of bytes (AVX-512 VNNI: Intel since 2019, AMD since 2022).

Groups are multiplied as `groups.py` says. 16 outputs lie in one register, and four inputs of each are multiplied at once by four bytes of
a row. Of the two bytes of a product one has no sign: codes of 8 bits are taken as 128 more than they are, which the sums are rid of.

Axes: R rows, I inputs, O outputs, G groups of 32 inputs. A slab is up to 16 rows.
"""

import functools
import platform
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from llvmlite import ir

from eesd_jax.kernels.cpu import calls
from eesd_jax.kernels.cpu import rows as cpu_rows
from eesd_jax.kernels.cpu.calls import BYTES, FLOATS, I32, I64
from eesd_jax.kernels.cpu.groups import (
    BLOCK_OUTPUTS,
    DIGITS,
    INTEGERS,
    SLAB_ROWS,
    VECTOR,
    Kind,
    add_quantize,
    ask,
    constant,
    numbers,
    scaled,
    slab,
    slabs,
    store,
    unpack,
)
from eesd_jax.model.stored import GROUP

TARGET = "eesd_jax_rows_by_dots"
_QUANTIZE = "eesd_jax_quantize_for_dots"
_ROWS_AT_ONCE = 5  # as many sums as registers hold, beside the codes
_CHUNKS_PER_CORE = 2
# A record is what a row's group is, in bytes: three digits of 32 inputs, scale, sum, and what the sums of the lowest and the highest digit
# start from with codes of 8 bits. Records of a group's rows lie one behind the other, so that all are read from one address.
_RECORD, _SCALE, _SUM, _STARTS = 128, 96, 100, {0: 104, 2: 108}


@functools.cache
def available() -> bool:
    """Whether this processor has such products."""
    return platform.machine() in ("x86_64", "AMD64") and calls.has_features("avx512vnni", "avx512f", "avx512bw", "f16c")


def multiply(x_RxI: jax.Array, kind: Kind, weight: Sequence[jax.Array]) -> jax.Array:
    """Float32 [R, I] times the [O, I] that `integers.Integers` stand for, of which `weight` is what there is, giving [R, O]."""
    (rows, inputs), blocks = x_RxI.shape, weight[0].shape[0]
    _register_quantize()
    shape = jax.ShapeDtypeStruct((rows * inputs // GROUP, _RECORD), jnp.int8)
    records = jax.ffi.ffi_call(_QUANTIZE, shape)(x_RxI, **calls.split(-(-rows // SLAB_ROWS), 1))
    target = f"{TARGET}_{kind.name}"
    _register(target, kind)
    result = jax.ShapeDtypeStruct((rows, blocks * BLOCK_OUTPUTS), jnp.float32)
    return jax.ffi.ffi_call(target, result)(records, *weight, **calls.split(blocks, _CHUNKS_PER_CORE))


@functools.cache
def _register_quantize() -> None:
    calls.register(_QUANTIZE, (("x", "rows", "inputs"),), (("records",),), ("chunks", "helpers"), _add_quantize_chunk)


@functools.cache
def _register(target: str, kind: Kind) -> None:
    arguments = (("records",), *kind.buffers)
    calls.register(target, arguments, (("out", "rows"),), ("chunks", "helpers"), functools.partial(_add_chunk, kind))


def _add_starts(
    builder: ir.IRBuilder, group: ir.Value, arguments: Sequence[ir.Value], integers: Sequence[ir.Value], total: ir.Value
) -> None:
    """Writes what rids sums of 128 times the digits: of the highest one, and of the others together."""
    _, _, record, _, step, *_ = arguments
    add_up = calls.external(builder.module, "llvm.vector.reduce.add.v16i32", I32, INTEGERS)
    half, place = constant(0x8080, INTEGERS), constant(16, INTEGERS)  # digits are from -128 to 127
    highest = builder.call(add_up, (builder.add(*(builder.ashr(builder.add(integer, half), place) for integer in integers)),))
    others = builder.sub(total, builder.shl(highest, I32(16)))
    for digit, of_digits in ((0, others), (2, highest)):
        address = builder.gep(record, [builder.add(builder.mul(group, step), I64(_STARTS[digit]))])
        store(builder, builder.mul(of_digits, I32(-128)), address)


def _dot_products(builder: ir.IRBuilder, kind: Kind, rows: int, weights: Sequence[ir.Value], records: ir.Value) -> list[ir.Value]:
    """Sums of digits times codes: of a row's lowest, middle and highest digits, then of the next row's.

    In assembly, because each dot product waits for the one before in the same sum, and LLVM puts those side by side.
    """
    parts = 2 if rows < 3 else 1  # with few rows a sum is taken in two, for the same reason
    sums, lines = range(rows * DIGITS * parts), []
    for i in range(len(weights)):
        for j in range(rows * DIGITS):
            row, digit = divmod(j, DIGITS)
            total, of_digit = j * parts + i % parts, row * _RECORD + digit * GROUP
            if i == 0 and digit in _STARTS and not kind.nibbles:
                lines.append(f"vpbroadcastd {row * _RECORD + _STARTS[digit]}(${{records}}), ${total}")
            elif i < parts:
                lines.append(f"vpxord ${total}, ${total}, ${total}")
            lines.append(f"vpdpbusd {of_digit + 4 * i}(${{records}}){{1to16}}, ${len(sums) + i}, ${total}")
    assembly = "\n".join(lines).replace("${records}", f"${len(sums) + len(weights)}")
    constraints = ",".join([*["=&v"] * len(sums), *["v"] * len(weights), "r", "~{memory}"])
    function = ir.FunctionType(ir.LiteralStructType([INTEGERS] * len(sums)), [*[INTEGERS] * len(weights), BYTES])
    found = builder.asm(function, assembly, constraints, [*weights, records], side_effect=False)
    found = [builder.extract_value(found, i) for i in sums]
    return found if parts == 1 else [builder.add(*found[i : i + 2]) for i in sums[::2]]


def _add_dots(module: ir.Module, kind: Kind) -> ir.Function:
    """`dots(records, groups, codes, weight scale, weight offset, first, end, out, outputs, rows)`.

    Writes the products of rows, of which `quantize` left records, with the outputs of blocks first to end - 1 into `out`.
    """
    arguments = (BYTES, I64, BYTES, BYTES, BYTES, I64, I64, FLOATS, I64, I64)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), "dots")
    function.linkage = "internal"
    records, groups, codes, w_scale, w_offset, first, end, out, outputs, rows = function.args
    w_numbers = (w_scale, w_offset)[: len(kind.halves)]
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    totals = builder.alloca(VECTOR, size=I64(SLAB_ROWS))
    totals.align = 64

    with calls.loop(builder, first, end, 1) as block:
        with calls.loop(builder, I64(0), rows, 1) as row:
            builder.store(constant(0.0, VECTOR), builder.gep(totals, [row]))
        with calls.loop(builder, I64(0), groups, 1) as group:
            place = builder.add(builder.mul(block, groups), group)
            ask(builder, kind, codes, w_numbers, place)
            weights = unpack(builder, kind, builder.gep(codes, [builder.mul(place, I64(kind.group_bytes))]))
            scale, offset = (*(numbers(builder, *of, place) for of in zip(w_numbers, kind.halves, strict=True)), None)[:2]
            if not kind.nibbles:  # of a dot product's bytes those of one side have no sign
                weights = [builder.xor(vector, constant(0x80808080, INTEGERS)) for vector in weights]
            of_group = builder.gep(records, [builder.mul(builder.mul(group, rows), I64(_RECORD))])

            def run(rows_at_once: int, row: ir.Value) -> None:
                here = builder.gep(of_group, [builder.mul(row, I64(_RECORD))])
                all_sums = _dot_products(builder, kind, rows_at_once, weights, here)
                for i in range(rows_at_once):
                    record = builder.gep(here, [I64(_RECORD * i)])
                    x_scale, x_sum = (builder.bitcast(builder.gep(record, [I64(at)]), FLOATS) for at in (_SCALE, _SUM))
                    total, sums = builder.gep(totals, [builder.add(row, I64(i))]), all_sums[DIGITS * i : DIGITS * (i + 1)]
                    builder.store(scaled(builder, builder.load(total), sums, scale, offset, x_scale, x_sum), total)

            cpu_rows.sweep(builder, rows, _ROWS_AT_ONCE, run)
        with calls.loop(builder, I64(0), rows, 1) as row:
            address = builder.add(builder.mul(outputs, row), builder.mul(block, I64(BLOCK_OUTPUTS)))
            store(builder, builder.load(builder.gep(totals, [row])), builder.gep(out, [address]))
    builder.ret_void()
    return function


def _add_quantize_chunk(module: ir.Module, words: Sequence[str], registers: calls.Registers) -> ir.Function:
    """`chunk(job, index)`: an even share of the slabs."""
    del registers
    quantize = add_quantize(module, _add_starts)
    builder, job, chunk = calls.start_chunk(module, words)
    x, records = job.floats(builder, "x"), builder.inttoptr(job.read(builder, "records"), BYTES)
    rows, inputs, chunks = (job.read(builder, name) for name in ("rows", "inputs", "chunks"))
    groups = builder.sdiv(inputs, I64(GROUP))
    begin, end = calls.share(builder, slabs(builder, rows), chunk, chunks)
    with calls.loop(builder, begin, end, 1) as index:
        first, count = slab(builder, rows, index)
        of_slab = builder.gep(records, [builder.mul(first, builder.mul(groups, I64(_RECORD)))])
        step = builder.mul(count, I64(_RECORD))
        with calls.loop(builder, I64(0), count, 1) as i:
            here = builder.gep(x, [builder.mul(builder.add(first, i), inputs)])
            record = builder.gep(of_slab, [builder.mul(i, I64(_RECORD))])
            of_group = [builder.gep(record, [I64(at)]) for at in (_SCALE, _SUM)]
            builder.call(quantize, (here, groups, record, I64(GROUP), step, *of_group, step))
    builder.ret_void()
    return builder.function


def _add_chunk(kind: Kind, module: ir.Module, words: Sequence[str], registers: calls.Registers) -> ir.Function:
    """`chunk(job, index)`: an even share of the blocks of outputs."""
    del registers
    dots = _add_dots(module, kind)
    builder, job, chunk = calls.start_chunk(module, words)
    out = job.floats(builder, "out")
    records, *weight = (builder.inttoptr(job.read(builder, name), BYTES) for name in ("records", *kind.fields))
    weight += [ir.Constant(BYTES, None)] * (3 - len(weight))
    rows, groups, blocks, chunks = (job.read(builder, name) for name in ("rows", "groups", "blocks", "chunks"))
    outputs = builder.mul(blocks, I64(BLOCK_OUTPUTS))
    begin, end = calls.share(builder, blocks, chunk, chunks)
    with calls.loop(builder, I64(0), slabs(builder, rows), 1) as index:
        first, count = slab(builder, rows, index)
        of_slab = builder.gep(records, [builder.mul(first, builder.mul(groups, I64(_RECORD)))])
        target = builder.gep(out, [builder.mul(first, outputs)])
        builder.call(dots, (of_slab, groups, *weight, begin, end, target, outputs, count))
    builder.ret_void()
    return builder.function
