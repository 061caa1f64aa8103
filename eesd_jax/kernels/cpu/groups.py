"""Groups of 32 numbers as products of small integers take them: what `tiles.py` and `dots.py` have in common.

A group of inputs is taken as integers of 23 bits and a sign, times a power of two that the largest of them decides; what is lost is of the
size of what float32 sums lose. The integers are three digits to the base of 256; digits times codes are summed exactly, and only the sums
of groups are scaled and added up in float32, in the order of groups. So an output is the same to the bit whatever the number of rows, and
whatever multiplies.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from llvmlite import ir

from eesd_jax.kernels.cpu import calls
from eesd_jax.kernels.cpu.calls import BYTES, F32, FLOATS, I32, I64
from eesd_jax.model.stored import GROUP

BLOCK_OUTPUTS = 16
DIGITS = 3
SLAB_ROWS = 16  # rows that are worked on together, at most
_AHEAD = 16  # groups that memory is asked for early
I8 = ir.IntType(8)
INTEGERS, VECTOR = ir.VectorType(I32, 16), ir.VectorType(F32, 16)

# Writes more code of a group: (builder, group, arguments of `quantize`, its integers, their sum).
More = Callable[[ir.IRBuilder, ir.Value, Sequence[ir.Value], Sequence[ir.Value], ir.Value], None]


class Kind(NamedTuple):
    """nibbles: codes of 4 bits, with offsets; else of 8, without. halves: of the scale and the offset, whether they are float16."""

    nibbles: bool
    halves: tuple[bool, ...]

    @property
    def name(self) -> str:
        return "_".join(("nibbles" if self.nibbles else "bytes", *("16" if half else "32" for half in self.halves)))

    @property
    def group_bytes(self) -> int:
        return GROUP * BLOCK_OUTPUTS // (2 if self.nibbles else 1)

    @property
    def fields(self) -> tuple[str, ...]:
        """Words of a job that are addresses of a weight."""
        return ("codes", "scale", "offset")[: 1 + len(self.halves)]

    @property
    def buffers(self) -> tuple[tuple[str, ...], ...]:
        """A weight's buffers, see `calls.register`."""
        return (("codes", "blocks", "groups"), *((name,) for name in self.fields[1:]))


def constant(value: int | float, kind: ir.VectorType) -> ir.Constant:
    return ir.Constant(kind, [value] * 16)


def load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.load(builder.bitcast(address, kind.as_pointer()), align=1)


def store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    builder.store(value, builder.bitcast(address, value.type.as_pointer()), align=1)


def add_quantize(module: ir.Module, more: More | None = None) -> ir.Function:
    """`quantize(x, groups, digits, digit step, group step, scale, sum, step)`: the digits of a row.

    Their steps are bytes from one place to the next, and from one group to the next. For each group also the float that its integers are to
    be multiplied by, NaN where a number is not finite, and their sum times it, `step` bytes from one group to the next.
    `more(builder, group, arguments, integers, their sum)` may write what else is to be known of a group.
    """
    arguments = (FLOATS, I64, BYTES, I64, I64, BYTES, BYTES, I64)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), "quantize")
    function.linkage = "internal"
    x, groups, digits, digit_step, group_step, scale_out, sum_out, step = function.args
    greatest = calls.external(module, "llvm.vector.reduce.umax.v16i32", I32, INTEGERS)
    total = calls.external(module, "llvm.vector.reduce.add.v16i32", I32, INTEGERS)
    larger = calls.external(module, "llvm.umax.v16i32", INTEGERS, INTEGERS, INTEGERS)
    rounded = calls.external(module, "llvm.rint.v16f32", VECTOR, VECTOR)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    with calls.loop(builder, I64(0), groups, 1) as group:
        start = builder.mul(group, I64(GROUP))
        values = [load(builder, builder.gep(x, [builder.add(start, I64(i))]), VECTOR) for i in (0, 16)]
        sizes = [builder.and_(builder.bitcast(value, INTEGERS), constant(0x7FFFFFFF, INTEGERS)) for value in values]
        size = builder.call(greatest, (builder.call(larger, sizes),))
        # The exponent of the largest; one more where it is so near to the next that the digits would not hold it.
        exponent = builder.lshr(builder.add(size, I32(0x20000)), I32(23))
        exponent = builder.select(builder.icmp_unsigned("<", exponent, I32(22)), I32(22), exponent)
        up = builder.bitcast(builder.shl(builder.sub(I32(2 * 127 + 22), exponent), I32(23)), F32)
        down = builder.bitcast(builder.shl(builder.sub(exponent, I32(22)), I32(23)), F32)
        down = builder.select(builder.icmp_unsigned(">=", exponent, I32(255)), F32(float("nan")), down)
        integers = [
            builder.fptosi(builder.call(rounded, (builder.fmul(value, calls.splat(builder, up, 16)),)), INTEGERS) for value in values
        ]
        for i, integer in enumerate(integers):
            middle = constant(0x808080, INTEGERS)  # digits from -128 to 127
            shifted = builder.xor(builder.add(integer, middle), middle)
            for digit in range(DIGITS):
                place = builder.add(builder.mul(group, group_step), builder.add(builder.mul(digit_step, I64(digit)), I64(16 * i)))
                digit_bytes = builder.trunc(builder.lshr(shifted, constant(8 * digit, INTEGERS)), ir.VectorType(I8, 16))
                store(builder, digit_bytes, builder.gep(digits, [place]))
        of_group = builder.call(total, (builder.add(*integers),))
        for number, array in ((down, scale_out), (builder.fmul(builder.sitofp(of_group, F32), down), sum_out)):
            store(builder, number, builder.gep(array, [builder.mul(group, step)]))
        if more is not None:
            more(builder, group, function.args, integers, of_group)
    builder.ret_void()
    return function


def numbers(builder: ir.IRBuilder, array: ir.Value, half: bool, place: ir.Value) -> ir.Value:
    """The scales or offsets of a block's group."""
    item = ir.HalfType() if half else F32
    address = builder.gep(builder.bitcast(array, item.as_pointer()), [builder.mul(place, I64(BLOCK_OUTPUTS))])
    found = load(builder, address, ir.VectorType(item, 16))
    return builder.fpext(found, VECTOR) if half else found


def ask(builder: ir.IRBuilder, kind: Kind, codes: ir.Value, numbers: Sequence[ir.Value], place: ir.Value) -> None:
    """Asks memory for a later group."""
    prefetch = calls.external(builder.module, "llvm.prefetch.p0i8", ir.VoidType(), BYTES, I32, I32, I32)
    sizes = [BLOCK_OUTPUTS * (2 if half else 4) for half in kind.halves]
    for array, size in zip((codes, *numbers), (kind.group_bytes, *sizes), strict=True):
        address = builder.gep(array, [builder.mul(builder.add(place, I64(_AHEAD)), I64(size))])
        for line in range(0, size, 64):
            builder.call(prefetch, (builder.gep(address, [I64(line)]), I32(0), I32(2), I32(1)))


def unpack(builder: ir.IRBuilder, kind: Kind, weights: ir.Value) -> list[ir.Value]:
    """The codes of a group, a byte each: 4 inputs of 16 outputs a vector."""
    vectors = [load(builder, builder.gep(weights, [I64(i)]), INTEGERS) for i in range(0, kind.group_bytes, 64)]
    if not kind.nibbles:
        return vectors
    low, four = constant(0x0F0F0F0F, INTEGERS), constant(4, INTEGERS)
    lower = [builder.and_(pairs, low) for pairs in vectors]
    return lower + [builder.and_(builder.lshr(pairs, four), low) for pairs in vectors]


def scaled(
    builder: ir.IRBuilder,
    before: ir.Value,
    sums: Sequence[ir.Value],
    scale: ir.Value,
    offset: ir.Value | None,
    x_scale: ir.Value,
    x_sum: ir.Value,
) -> ir.Value:
    """A row's outputs so far, and a group more, of which the sums of the lowest, middle and highest digits times codes are given.

    x_scale, x_sum: addresses of what `quantize` says of the row's group.
    """
    fma = calls.external(builder.module, "llvm.fma.v16f32", VECTOR, VECTOR, VECTOR, VECTOR)
    lowest, middle, highest = sums
    lower = builder.sitofp(builder.add(builder.shl(middle, constant(8, INTEGERS)), lowest), VECTOR)
    product = builder.call(fma, (builder.sitofp(highest, VECTOR), constant(65536.0, VECTOR), lower))
    factor = builder.fmul(scale, calls.splat(builder, builder.load(x_scale), 16))
    after = builder.call(fma, (product, factor, before))
    if offset is None:
        return after
    return builder.call(fma, (offset, calls.splat(builder, builder.load(x_sum), 16), after))


def slab(builder: ir.IRBuilder, rows: ir.Value, index: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The first row of a slab, and how many there are."""
    first = builder.mul(index, I64(SLAB_ROWS))
    remaining = builder.sub(rows, first)
    return first, builder.select(builder.icmp_signed("<", remaining, I64(SLAB_ROWS)), remaining, I64(SLAB_ROWS))


def slabs(builder: ir.IRBuilder, rows: ir.Value) -> ir.Value:
    """How many there are."""
    return builder.sdiv(builder.add(rows, I64(SLAB_ROWS - 1)), I64(SLAB_ROWS))
