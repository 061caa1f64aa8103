"""Rows times a matrix of 4- or 8-bit codes on a CPU with tiles (Intel AMX): products of small integers, 16 outputs and 16 rows at a time.

Verifying drafts multiplies several rows by every weight, and in float32 (`cpu_codes`) each row costs arithmetic of its own. Tiles multiply
five rows in less time than memory needs to bring the codes, so that a few drafts are verified nearly for free.

A group of 32 inputs is taken as integers of 23 bits and a sign, times a power of two that the largest of them decides; what is lost is of
the size of what float32 sums lose. The integers are three digits to the base of 256; digits times codes are summed exactly, and only the
sums of groups are scaled and added up in float32, in the order of groups. An output is the same to the bit whatever the number of rows.

Axes: R rows, I inputs, O outputs, G groups of 32 inputs. A slab is up to 16 rows.
"""

import ctypes
import functools
import platform
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from llvmlite import binding, ir

from eesd_jax.model import cpu_calls
from eesd_jax.model.cpu_calls import BYTES, F32, FLOATS, I32, I64
from eesd_jax.model.cpu_codes import GROUP, Codes

TARGET = "eesd_jax_rows_by_tiles"
_QUANTIZE = "eesd_jax_quantize_rows"
BLOCK_OUTPUTS = 16  # of a tile
_DIGITS = 3
_ROWS_AT_ONCE = (1, 2, 3, 4, 5, 6, 8, 10, 16)  # code is written for; other numbers of rows are padded
_MOST_ROWS = _ROWS_AT_ONCE[-1]
_CHUNKS_PER_CORE = 2
_AHEAD = 16  # groups that memory is asked for early
_PIECE = 8  # groups whose codes are unpacked before they are used: a tile cannot be loaded from what was stored just now
_I8 = ir.IntType(8)
_INTEGERS, _VECTOR = ir.VectorType(I32, 16), ir.VectorType(F32, 16)
_PERMISSION, _TILE_DATA = (158, 0x1023), 18  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)


class Tiles(NamedTuple):
    """`Codes`, as tiles take them.

    codes: int8 [O / 16, G, 512]: of inputs 4 i to 4 i + 3 of a group those of the first output, then of the second, up to the sixteenth; or
    uint8 [O / 16, G, 256], the same of codes of 0..15, those of a group's first 16 inputs in the low bits, of the others in the high ones.
    scale, offset: [O / 16, G, 16], float16 where that loses nothing, else float32; there is no offset for bytes.
    """

    codes: jax.Array
    scale: jax.Array
    offset: jax.Array | None


@functools.cache
def has_tiles() -> bool:
    """Whether this processor multiplies by tiles, and the system lets it."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    features = binding.get_host_cpu_features()
    if not all(features.get(name, False) for name in ("amx-int8", "avx512f", "avx512bw", "f16c")):
        return False
    # A process has to ask, once, for registers of that size.
    return ctypes.CDLL(None).syscall(*_PERMISSION, _TILE_DATA) == 0


def from_codes(codes: Codes) -> Codes | Tiles:
    """Tiles of codes that they can stand for, on a processor that has them; else the codes."""
    if not has_tiles():
        return codes
    outputs, groups = codes.scale.shape
    if outputs % BLOCK_OUTPUTS:
        return codes
    blocks, bytes_ = outputs // BLOCK_OUTPUTS, np.asarray(codes.codes)
    # [block, output, group, quadruple of inputs, input] -> [block, group, quadruple, output, input]
    tiles = bytes_.reshape(blocks, BLOCK_OUTPUTS, groups, -1, 4).transpose(0, 2, 3, 1, 4).reshape(blocks, groups, -1)

    def per_group(array: jax.Array) -> jax.Array:
        numbers = np.asarray(array).reshape(blocks, BLOCK_OUTPUTS, groups).transpose(0, 2, 1)
        with np.errstate(over="ignore"):
            halves = numbers.astype(np.float16)
        return jnp.asarray(halves if np.array_equal(halves.astype(np.float32), numbers) else numbers)

    return Tiles(jnp.asarray(tiles), per_group(codes.scale), None if codes.offset is None else per_group(codes.offset))


def rows_by_tiles(x_RxI: jax.Array, weight: Tiles) -> jax.Array:
    """Float32 [R, I] times the [O, I] that the tiles stand for, giving [R, O]; on a CPU alone, see `cpu_calls.possible`."""
    (rows, inputs), blocks = x_RxI.shape, weight.codes.shape[0]
    slabs = -(-rows // _MOST_ROWS)
    _register_quantize()
    digits = jax.ShapeDtypeStruct((slabs, _DIGITS * _MOST_ROWS * inputs), jnp.int8)
    per_group = jax.ShapeDtypeStruct((slabs * _MOST_ROWS, inputs // GROUP), jnp.float32)
    integers = jax.ffi.ffi_call(_QUANTIZE, (digits, per_group, per_group))(x_RxI, **cpu_calls.split(slabs, 1))

    arrays = [array for array in weight if array is not None]
    kind = _Kind(weight.offset is not None, tuple(array.dtype == jnp.float16 for array in arrays[1:]))
    target = f"{TARGET}_{kind.name}"
    _register(target, kind)
    result = jax.ShapeDtypeStruct((rows, blocks * BLOCK_OUTPUTS), jnp.float32)
    return jax.ffi.ffi_call(target, result)(*integers, *arrays, **cpu_calls.split(blocks, _CHUNKS_PER_CORE))


class _Kind(NamedTuple):
    """nibbles: codes of 4 bits, with offsets; else of 8, without. halves: of the scale and the offset, whether they are float16."""

    nibbles: bool
    halves: tuple[bool, ...]

    @property
    def name(self) -> str:
        return "_".join(("nibbles" if self.nibbles else "bytes", *("16" if half else "32" for half in self.halves)))

    @property
    def group_bytes(self) -> int:
        return GROUP * BLOCK_OUTPUTS // (2 if self.nibbles else 1)


@functools.cache
def _register_quantize() -> None:
    results = (("digits",), ("scale",), ("sum",))
    cpu_calls.register(_QUANTIZE, (("x", "rows", "inputs"),), results, ("chunks", "helpers"), _add_quantize_chunk)


@functools.cache
def _register(target: str, kind: _Kind) -> None:
    arguments = [("digits",), ("x_scale", "padded", "groups"), ("x_sum",), ("codes", "blocks"), ("scale",), ("offset",)]
    arguments = arguments[: 4 + len(kind.halves)]
    cpu_calls.register(target, arguments, (("out", "rows"),), ("chunks", "helpers"), functools.partial(_add_chunk, kind))


def _constant(value: int | float, kind: ir.VectorType) -> ir.Constant:
    return ir.Constant(kind, [value] * 16)


def _load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.load(builder.bitcast(address, kind.as_pointer()), align=1)


def _store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    builder.store(value, builder.bitcast(address, value.type.as_pointer()), align=1)


def _add_quantize(module: ir.Module) -> ir.Function:
    """`quantize(x, groups, digits, stride, scale, sum)`: the digits of a row, `stride` bytes between those of one place and the next.

    For each group also the float that its integers are to be multiplied by, NaN where a number is not finite, and their sum times it.
    """
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), (FLOATS, I64, BYTES, I64, FLOATS, FLOATS)), "quantize")
    function.linkage = "internal"
    x, groups, digits, stride, scale_out, sum_out = function.args
    greatest = cpu_calls.external(module, "llvm.vector.reduce.umax.v16i32", I32, _INTEGERS)
    total = cpu_calls.external(module, "llvm.vector.reduce.add.v16i32", I32, _INTEGERS)
    larger = cpu_calls.external(module, "llvm.umax.v16i32", _INTEGERS, _INTEGERS, _INTEGERS)
    rounded = cpu_calls.external(module, "llvm.rint.v16f32", _VECTOR, _VECTOR)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    with cpu_calls.loop(builder, I64(0), groups, 1) as group:
        start = builder.mul(group, I64(GROUP))
        values = [_load(builder, builder.gep(x, [builder.add(start, I64(i))]), _VECTOR) for i in (0, 16)]
        sizes = [builder.and_(builder.bitcast(value, _INTEGERS), _constant(0x7FFFFFFF, _INTEGERS)) for value in values]
        size = builder.call(greatest, (builder.call(larger, sizes),))
        # The exponent of the largest; one more where it is so near to the next that the digits would not hold it.
        exponent = builder.lshr(builder.add(size, I32(0x20000)), I32(23))
        exponent = builder.select(builder.icmp_unsigned("<", exponent, I32(22)), I32(22), exponent)
        up = builder.bitcast(builder.shl(builder.sub(I32(2 * 127 + 22), exponent), I32(23)), F32)
        down = builder.bitcast(builder.shl(builder.sub(exponent, I32(22)), I32(23)), F32)
        down = builder.select(builder.icmp_unsigned(">=", exponent, I32(255)), F32(float("nan")), down)
        integers = [
            builder.fptosi(builder.call(rounded, (builder.fmul(value, cpu_calls.splat(builder, up, 16)),)), _INTEGERS) for value in values
        ]
        for i, integer in enumerate(integers):
            middle = _constant(0x808080, _INTEGERS)  # digits from -128 to 127
            shifted = builder.xor(builder.add(integer, middle), middle)
            for digit in range(_DIGITS):
                place = builder.add(builder.add(start, I64(16 * i)), builder.mul(stride, I64(digit)))
                digit_bytes = builder.trunc(builder.lshr(shifted, _constant(8 * digit, _INTEGERS)), ir.VectorType(_I8, 16))
                _store(builder, digit_bytes, builder.gep(digits, [place]))
        builder.store(down, builder.gep(scale_out, [group]))
        of_group = builder.sitofp(builder.call(total, (builder.add(*integers),)), F32)
        builder.store(builder.fmul(of_group, down), builder.gep(sum_out, [group]))
    builder.ret_void()
    return function


def _tile_config(module: ir.Module, rows: int) -> ir.GlobalVariable:
    """What the tiles 0 to 6 are: C, A and B of `_add_blocks`."""
    _, c_rows = _parts(rows)
    config = np.zeros(64, np.uint8)
    config[0] = 1
    columns, counts = config[16:48].view(np.uint16), config[48:]
    columns[:3], counts[:3] = 64, c_rows
    columns[3:6], counts[3:6] = GROUP, c_rows
    columns[6], counts[6] = 64, GROUP // 4
    kind = ir.ArrayType(_I8, 64)
    variable = ir.GlobalVariable(module, kind, f"tiles_of_{rows}")
    variable.initializer, variable.global_constant, variable.linkage = ir.Constant(kind, bytearray(config.tobytes())), True, "internal"
    variable.align = 64
    return variable


def _parts(rows: int) -> tuple[int, int]:
    """Into how many tiles the digits of so many rows go, and how many to each."""
    parts = -(-_DIGITS * rows // 16)
    return parts, _DIGITS * rows // parts


def _add_blocks(module: ir.Module, kind: _Kind, rows: int) -> ir.Function:
    """`blocks(digits, scale, sum, groups, codes, weight scale, weight offset, first, end, out, outputs, valid)`.

    Writes the products of `rows` rows, whose digits lie as `quantize` leaves them with `rows` rows between one place and the next, with the
    outputs of blocks first to end - 1 into the first `valid` rows of `out`.
    """
    arguments = (BYTES, FLOATS, FLOATS, I64, BYTES, BYTES, BYTES, I64, I64, FLOATS, I64, I64)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), f"blocks_of_{rows}")
    function.linkage = "internal"
    digits, x_scale, x_sum, groups, codes, w_scale, w_offset, first, end, out, outputs, valid = function.args

    def tile(name: str, *arguments: ir.Type) -> ir.Function:
        return cpu_calls.external(module, f"llvm.x86.{name}", ir.VoidType(), *arguments)

    fma = cpu_calls.external(module, "llvm.fma.v16f32", _VECTOR, _VECTOR, _VECTOR, _VECTOR)
    prefetch = cpu_calls.external(module, "llvm.prefetch.p0i8", ir.VoidType(), BYTES, I32, I32, I32)
    load_tile, store_tile = tile("tileloadd64", _I8, BYTES, I64), tile("tilestored64", _I8, BYTES, I64)
    multiply, clear = tile("tdpbssd", _I8, _I8, _I8), tile("tilezero", _I8)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    unpacked = builder.alloca(_I8, size=I64(_PIECE * GROUP * BLOCK_OUTPUTS))
    sums = builder.alloca(I32, size=I64(_DIGITS * rows * BLOCK_OUTPUTS))
    unpacked.align = sums.align = 64
    builder.call(tile("ldtilecfg", BYTES), (builder.bitcast(_tile_config(module, rows), BYTES),))
    inputs = builder.mul(groups, I64(GROUP))
    parts, part_rows = _parts(rows)

    def numbers(array: ir.Value, half: bool, place: ir.Value) -> ir.Value:
        item = ir.HalfType() if half else F32
        address = builder.gep(builder.bitcast(array, item.as_pointer()), [builder.mul(place, I64(BLOCK_OUTPUTS))])
        found = _load(builder, address, ir.VectorType(item, 16))
        return builder.fpext(found, _VECTOR) if half else found

    def ask(array: ir.Value, size: int, place: ir.Value) -> None:
        address = builder.gep(array, [builder.mul(builder.add(place, I64(_AHEAD)), I64(size))])
        for line in range(0, size, 64):
            builder.call(prefetch, (builder.gep(address, [I64(line)]), I32(0), I32(2), I32(1)))

    def unpack(place: ir.Value, target: ir.Value) -> None:
        weights = builder.gep(codes, [builder.mul(place, I64(kind.group_bytes))])
        low, four = _constant(0x0F0F0F0F, _INTEGERS), _constant(4, _INTEGERS)
        for i in range(0, kind.group_bytes, 64):
            pairs = _load(builder, builder.gep(weights, [I64(i)]), _INTEGERS)
            _store(builder, builder.and_(pairs, low), builder.gep(target, [I64(i)]))
            _store(builder, builder.and_(builder.lshr(pairs, four), low), builder.gep(target, [I64(kind.group_bytes + i)]))

    def step(block: ir.Value, start: ir.Value, group: ir.Value, totals: Sequence[ir.Value]) -> Sequence[ir.Value]:
        place = builder.add(builder.mul(block, groups), group)
        ask(codes, kind.group_bytes, place)
        ask(w_scale, 16 * (2 if kind.halves[0] else 4), place)
        if kind.nibbles:
            ask(w_offset, 16 * (2 if kind.halves[1] else 4), place)
            weights = builder.gep(unpacked, [builder.mul(builder.sub(group, start), I64(GROUP * BLOCK_OUTPUTS))])
        else:
            weights = builder.gep(codes, [builder.mul(place, I64(kind.group_bytes))])
        builder.call(load_tile, (_I8(6), weights, I64(64)))
        for part in range(parts):
            begin = builder.add(builder.mul(inputs, I64(part * part_rows)), builder.mul(group, I64(GROUP)))
            builder.call(clear, (_I8(part),))
            builder.call(load_tile, (_I8(3 + part), builder.gep(digits, [begin]), inputs))
            builder.call(multiply, (_I8(part), _I8(3 + part), _I8(6)))
            address = builder.gep(sums, [I64(part * part_rows * BLOCK_OUTPUTS)])
            builder.call(store_tile, (_I8(part), builder.bitcast(address, BYTES), I64(4 * BLOCK_OUTPUTS)))
        scale = numbers(w_scale, kind.halves[0], place)
        offset = numbers(w_offset, kind.halves[1], place) if kind.nibbles else None
        following = []
        for row, before in enumerate(totals):
            places = [I64((digit * rows + row) * BLOCK_OUTPUTS) for digit in range(_DIGITS)]
            lowest, middle, highest = (_load(builder, builder.gep(sums, [at]), _INTEGERS) for at in places)
            lower = builder.sitofp(builder.add(builder.shl(middle, _constant(8, _INTEGERS)), lowest), _VECTOR)
            product = builder.call(fma, (builder.sitofp(highest, _VECTOR), _constant(65536.0, _VECTOR), lower))
            here = builder.add(builder.mul(groups, I64(row)), group)
            factor = builder.fmul(scale, cpu_calls.splat(builder, builder.load(builder.gep(x_scale, [here])), 16))
            after = builder.call(fma, (product, factor, before))
            if offset is not None:
                after = builder.call(fma, (offset, cpu_calls.splat(builder, builder.load(builder.gep(x_sum, [here])), 16), after))
            following.append(after)
        return following

    def piece(block: ir.Value, start: ir.Value, totals: Sequence[ir.Value]) -> Sequence[ir.Value]:
        end = builder.add(start, I64(_PIECE))
        end = builder.select(builder.icmp_signed("<", end, groups), end, groups)
        if kind.nibbles:
            with cpu_calls.loop(builder, start, end, 1) as group:
                target = builder.gep(unpacked, [builder.mul(builder.sub(group, start), I64(GROUP * BLOCK_OUTPUTS))])
                unpack(builder.add(builder.mul(block, groups), group), target)
        return cpu_calls.fold(builder, start, end, 1, totals, functools.partial(step, block, start))

    with cpu_calls.loop(builder, first, end, 1) as block:
        zero = _constant(0.0, _VECTOR)
        totals = cpu_calls.fold(builder, I64(0), groups, _PIECE, [zero] * rows, functools.partial(piece, block))
        for row, value in enumerate(totals):
            with builder.if_then(builder.icmp_signed("<", I64(row), valid)):
                address = builder.add(builder.mul(outputs, I64(row)), builder.mul(block, I64(BLOCK_OUTPUTS)))
                _store(builder, value, builder.gep(out, [address]))
    builder.call(tile("tilerelease"), ())
    builder.ret_void()
    return function


def _slab(builder: ir.IRBuilder, rows: ir.Value, slab: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The first row of a slab, how many there are, and how many code is run for."""
    first = builder.mul(slab, I64(_MOST_ROWS))
    remaining = builder.sub(rows, first)
    valid = builder.select(builder.icmp_signed("<", remaining, I64(_MOST_ROWS)), remaining, I64(_MOST_ROWS))
    padded = I64(_MOST_ROWS)
    for count in reversed(_ROWS_AT_ONCE):
        padded = builder.select(builder.icmp_signed("<=", valid, I64(count)), I64(count), padded)
    return first, valid, padded


def _add_quantize_chunk(module: ir.Module, words: Sequence[str], registers: cpu_calls.Registers) -> ir.Function:
    """`chunk(job, index)`: an even share of the slabs."""
    del registers
    quantize = _add_quantize(module)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), (BYTES, I64)), "chunk")
    address, chunk = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    job = cpu_calls.Job(words, address)
    x, scale, total = (job.floats(builder, name) for name in ("x", "scale", "sum"))
    digits = builder.inttoptr(job.read(builder, "digits"), BYTES)
    rows, inputs, chunks = (job.read(builder, name) for name in ("rows", "inputs", "chunks"))
    groups = builder.sdiv(inputs, I64(GROUP))
    slabs = builder.sdiv(builder.add(rows, I64(_MOST_ROWS - 1)), I64(_MOST_ROWS))
    begin, end = cpu_calls.share(builder, slabs, chunk, chunks)
    with cpu_calls.loop(builder, begin, end, 1) as slab:
        first, valid, padded = _slab(builder, rows, slab)
        of_slab = builder.gep(digits, [builder.mul(first, builder.mul(inputs, I64(_DIGITS)))])
        with cpu_calls.loop(builder, I64(0), valid, 1) as i:
            row = builder.add(first, i)
            here, per_group = builder.gep(x, [builder.mul(row, inputs)]), builder.mul(row, groups)
            target, stride = builder.gep(of_slab, [builder.mul(i, inputs)]), builder.mul(inputs, padded)
            arguments = (here, groups, target, stride, builder.gep(scale, [per_group]), builder.gep(total, [per_group]))
            builder.call(quantize, arguments)
    builder.ret_void()
    return function


def _add_chunk(kind: _Kind, module: ir.Module, words: Sequence[str], registers: cpu_calls.Registers) -> ir.Function:
    """`chunk(job, index)`: an even share of the blocks of outputs."""
    del registers
    blocks_of = {rows: _add_blocks(module, kind, rows) for rows in _ROWS_AT_ONCE}
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), (BYTES, I64)), "chunk")
    address, chunk = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    job = cpu_calls.Job(words, address)
    x_scale, x_sum, out = (job.floats(builder, name) for name in ("x_scale", "x_sum", "out"))
    digits, *weight = (builder.inttoptr(job.read(builder, name), BYTES) for name in ("digits", "codes", "scale"))
    weight.append(builder.inttoptr(job.read(builder, "offset"), BYTES) if kind.nibbles else ir.Constant(BYTES, None))
    rows, groups, blocks, chunks = (job.read(builder, name) for name in ("rows", "groups", "blocks", "chunks"))
    inputs, outputs = builder.mul(groups, I64(GROUP)), builder.mul(blocks, I64(BLOCK_OUTPUTS))
    begin, end = cpu_calls.share(builder, blocks, chunk, chunks)
    slabs = builder.sdiv(builder.add(rows, I64(_MOST_ROWS - 1)), I64(_MOST_ROWS))
    with cpu_calls.loop(builder, I64(0), slabs, 1) as slab:
        first, valid, padded = _slab(builder, rows, slab)
        of_slab = builder.gep(digits, [builder.mul(first, builder.mul(inputs, I64(_DIGITS)))])
        scale, total = (builder.gep(array, [builder.mul(first, groups)]) for array in (x_scale, x_sum))
        target = builder.gep(out, [builder.mul(first, outputs)])
        for count, function_of in blocks_of.items():
            with builder.if_then(builder.icmp_signed("==", padded, I64(count))):
                builder.call(function_of, (of_slab, scale, total, groups, *weight, begin, end, target, outputs, valid))
    builder.ret_void()
    return function
