"""Reads from a compiled program's HLO text what it does: arithmetic, memory traffic, and bytes between chips.

XLA's own `cost_analysis` counts the body of a loop once, whatever its length; here it is counted as often as it runs. Only matrix products
count as arithmetic. Memory traffic is what unfused instructions read from and write to main memory. Where only a slice of an array is used,
the slice counts; where a collective runs beside several fusions, its arrays count once. All figures are for one chip.
"""

import collections
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

# Bytes that a chip sends (and receives) for each byte that it gives to a collective among n chips, with the best algorithm.
_TRAFFIC = {
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
}
# Move nothing.
_FREE = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "opt-barrier")
)
# Calls by which the compiler tells itself something.
_MARKS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveStart", "AsyncCollectiveDone", "ConcatBitcast")
_SLICES = ("dynamic-slice", "slice", "gather")
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]+[0-9]*\w*)\[([0-9,]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([^\s(]+) \(.*\{$")


class Instruction(NamedTuple):
    """One line of HLO. kind: text of its type. given: text of its operands. details: the text after them."""

    name: str
    kind: str
    opcode: str
    given: str
    details: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """Lists the names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.given)


class Cost(NamedTuple):
    """The work of one run, on one chip.

    flops: multiplications and additions of matrix products. bytes: read from and written to main memory. collectives: bytes that the chip
    sends, by kind. open_loops: how many loops have a length that depends on data; see `Module.run` for how they are counted.
    """

    flops: float
    bytes: float
    collectives: dict[str, float]
    open_loops: int

    def __add__(self, other: "Cost") -> "Cost":
        sums = collections.Counter(self.collectives)
        sums.update(other.collectives)
        return Cost(self.flops + other.flops, self.bytes + other.bytes, dict(sums), self.open_loops + other.open_loops)

    def times(self, count: float) -> "Cost":
        return Cost(
            self.flops * count, self.bytes * count, {kind: count * size for kind, size in self.collectives.items()}, self.open_loops
        )


_NOTHING = Cost(0.0, 0.0, {}, 0)


def cost(text: str, open_trips: Sequence[int] = (1,)) -> Cost:
    """Counts the cost of a program whose text is `compiled.as_text()`; see `Module.run`."""
    return Module(text).run(open_trips)


class Module:
    """A program, parsed. text: `compiled.as_text()`."""

    def __init__(self, text: str):
        self.entry = ""
        self._chosen: dict[int, int] = {}
        self.computations: dict[str, dict[str, Instruction]] = {}
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if (match := _COMPUTATION.match(line)) and " = " not in line.split("(", 1)[0]:
                current = self.computations[match[2]] = {}
                self.entry = match[2] if match[1] else self.entry
            elif found := _parse(line):
                current[found.name] = found

    def run(self, open_trips: Sequence[int] = (1,), chosen: Mapping[int, int] | None = None) -> Cost:
        """Counts the cost of one run.

        Args:
          open_trips: how often to count the body of a loop whose length is not known: of an outer one, of one within such a loop, ...;
            the last number holds for all deeper ones.
          chosen: which branch to count, by the number of branches of a conditional; of other conditionals the costliest counts.
        """
        self._chosen = dict(chosen or {})
        return self.cost(self.entry, tuple(open_trips))

    def cost(self, name: str, open_trips: tuple[int, ...], channels: set[str] | None = None) -> Cost:
        """Counts the cost of a computation. channels: given where it is part of a fusion, the collectives that were counted already."""
        total = _NOTHING
        fused, channels = channels is not None, set() if channels is None else channels
        computation = self.computations[name]
        for one in computation.values():
            total += self._cost_of(one, computation, open_trips, channels, fused=fused)
        return total

    def _cost_of(
        self, one: Instruction, computation: dict[str, Instruction], open_trips: tuple[int, ...], channels: set[str], *, fused: bool
    ) -> Cost:
        opcode = one.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")) or _is_mark(one):
            return _NOTHING
        if opcode == "while":
            trips = self._trips(one, computation)
            inner = open_trips if trips is not None else open_trips[1:] or open_trips
            once = self.cost(_callee(one, "body"), inner) + self.cost(_callee(one, "condition"), inner)
            once = once.times(open_trips[0] if trips is None else trips)
            return once._replace(open_loops=once.open_loops + (trips is None))
        if opcode == "conditional":
            branches = _branches(one)
            if len(branches) in self._chosen:
                return self.cost(branches[self._chosen[len(branches)]], open_trips)
            costs = [self.cost(branch, open_trips) for branch in branches]
            return max(costs, key=lambda cost: (cost.bytes, cost.flops))
        if opcode == "call":
            return self.cost(_callee(one, "to_apply"), open_trips)
        if opcode == "async-start":
            return self.cost(_callee(one, "calls"), open_trips)
        if opcode == "fusion":
            callee = _callee(one, "calls")
            moved = 0.0 if fused else self._fusion_bytes(one, callee)
            return self.cost(callee, open_trips, channels) + Cost(0.0, moved, {}, 0)
        flops, collectives, moved = 0.0, {}, 0.0 if fused else _bytes(one, computation)
        if opcode == "dot":
            flops = _dot_flops(one, computation)
        elif opcode == "convolution":
            flops = _convolution_flops(one, computation)
        elif (base := opcode.removesuffix("-start")) in _TRAFFIC and _is_new(one, channels):
            given = sum(size(computation[name].kind, everywhere=True) for name in one.operands)
            collectives = {base: given * _TRAFFIC[base](group_size(one.details))}
            if fused:  # the fusion itself leaves it out, as it may stand in several
                moved = size(one.kind) + sum(size(source.kind) for source in _sources(one, computation) if source.opcode == "parameter")
        return Cost(flops, moved, collectives, 0)

    def _trips(self, one: Instruction, computation: dict[str, Instruction]) -> int | None:
        """Finds how often a loop runs: as XLA says, or as `for i in range(start, limit, step)` with constants; None where data decide."""
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', one.details):
            return int(match[1])
        condition, body = (self.computations[_callee(one, role)] for role in ("condition", "body"))
        compare, result, carried = _root(condition), _root(body), computation[one.operands[0]]
        if compare.opcode != "compare" or "direction=LT" not in compare.details or {result.opcode, carried.opcode} != {"tuple"}:
            return None
        counter, limit = compare.operands
        place = _place(counter, condition)
        if place is None:
            return None
        following = _original(result.operands[place], body)
        if following.opcode != "add" or _place(following.operands[0], body) != place:
            return None
        values = _constant(carried.operands[place], computation), _constant(limit, condition), _constant(following.operands[1], body)
        return None if None in values else len(range(*values))

    def _fusion_bytes(self, one: Instruction, callee: str) -> float:
        inner = self.computations[callee]
        read = sum(self._bytes_read(inner, number) for number in range(len(one.operands)))
        return read + self._bytes_written(inner, _root(inner))

    def _bytes_read(self, inner: dict[str, Instruction], number: int) -> float:
        """Counts the bytes that a fused computation reads of its parameter of that number."""
        parameter = next(one for one in inner.values() if one.opcode == "parameter" and int(one.given) == number)
        return min(self._bytes_used(inner, parameter), size(parameter.kind))

    def _bytes_used(self, inner: dict[str, Instruction], source: Instruction) -> float:
        if not size(source.kind):  # not in main memory
            return 0.0
        used = size(source.kind) if source.is_root else 0.0  # what a nested fusion passes on is taken for used
        for user in inner.values():
            for place, name in enumerate(user.operands):
                if name != source.name or _is_mark(user) or user.opcode in _TRAFFIC or (user.opcode == "tuple" and user.is_root):
                    continue  # handed on as it lies, or counted with the collective
                if user.opcode == "bitcast":
                    used += self._bytes_used(inner, user)
                elif user.opcode == "fusion":
                    used += self._bytes_read(self.computations[_callee(user, "calls")], place)
                elif user.opcode in _SLICES and place == 0:
                    used += size(user.kind, everywhere=True)
                elif not (user.opcode == "dynamic-update-slice" and place == 0):  # there it is written in place
                    return size(source.kind)
        return used

    def _bytes_written(self, inner: dict[str, Instruction], root: Instruction) -> float:
        if root.opcode == "tuple":
            return sum(self._bytes_written(inner, inner[name]) for name in root.operands)
        if not size(root.kind) or root.opcode == "parameter" or root.opcode in _TRAFFIC or _is_mark(root):
            return 0.0
        if root.opcode == "bitcast":
            return self._bytes_written(inner, inner[root.operands[0]])
        if root.opcode == "dynamic-update-slice":
            return size(inner[root.operands[1]].kind, everywhere=True)
        return size(root.kind)


def _parse(line: str) -> Instruction | None:
    match = re.match(r"\s*(ROOT )?%?([\w.\-]+) = ", line)
    if not match:
        return None
    rest = line[match.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, behind = rest[end:].lstrip().partition("(")
    close = _closing(behind, 1)
    return Instruction(match[2], rest[:end], opcode, behind[:close], behind[close + 1 :], bool(match[1]))


def _closing(text: str, depth: int) -> int:
    """Finds where the outermost bracket closes; `depth` brackets are open before the text."""
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i
    raise ValueError(f"no closing bracket in {text[:80]!r}")


def _is_mark(one: Instruction) -> bool:
    match = re.search(r'custom_call_target="(\w+)"', one.details)
    return one.opcode == "custom-call" and bool(match) and match[1] in _MARKS


def _is_new(one: Instruction, channels: set[str]) -> bool:
    """Says whether a collective is met for the first time: one that runs beside several fusions stands in each of them."""
    match = re.search(r"channel_id=(\d+)", one.details)
    channel = match[1] if match else one.name
    met = channel in channels
    channels.add(channel)
    return not met


def _sources(one: Instruction, computation: dict[str, Instruction]) -> list[Instruction]:
    return [computation[name] for name in one.operands if name in computation]


def _callee(one: Instruction, *roles: str) -> str:
    return next(match[1] for role in roles if (match := re.search(rf"\b{role}=\{{?%?([\w.\-]+)", one.details)))


def _branches(one: Instruction) -> list[str]:
    if match := re.search(r"branch_computations=\{([^}]*)\}", one.details):
        return re.findall(r"%?([\w.\-]+)", match[1])
    return [_callee(one, "true_computation"), _callee(one, "false_computation")]


def _root(computation: dict[str, Instruction]) -> Instruction:
    return next(one for one in computation.values() if one.is_root)


def _original(name: str, computation: dict[str, Instruction]) -> Instruction:
    """Follows copies, bitcasts and conversions back to the instruction that they begin from."""
    one = computation[name]
    while one.opcode in ("copy", "bitcast", "convert"):
        one = computation[one.operands[0]]
    return one


def _place(name: str, computation: dict[str, Instruction]) -> int | None:
    """Finds which element of a tuple an instruction takes; None where it takes none."""
    one = _original(name, computation)
    return int(re.search(r"index=(\d+)", one.details)[1]) if one.opcode == "get-tuple-element" else None


def _constant(name: str, computation: dict[str, Instruction]) -> int | None:
    """Reads the value of an integer constant; None for anything else."""
    one = _original(name, computation)
    return int(one.given) if one.opcode == "constant" and re.fullmatch(r"-?\d+", one.given) else None


def _arrays(kind: str) -> Iterator[tuple[str, list[int], str]]:
    """Yields element type, dimensions and layout of every array of a type."""
    for name, dimensions, layout in _ARRAY.findall(kind):
        yield name, [int(one) for one in dimensions.split(",") if one], layout


def size(kind: str, *, everywhere: bool = False) -> float:
    """Counts the bytes of a type's arrays: of those that lie in main memory, or of all with `everywhere`."""
    total = 0.0
    for name, dimensions, layout in _arrays(kind):
        if everywhere or not re.search(r"S\([1-9]", layout):
            total += math.prod(dimensions) * _bits(name) / 8
    return total


@functools.cache
def _bits(name: str) -> int:
    return _BITS[name] if name in _BITS else int(re.match(r"[a-z]+(\d+)", name)[1])


def _dimensions(name: str, computation: dict[str, Instruction]) -> list[int]:
    return next(_arrays(computation[name].kind))[1]


def _bytes(one: Instruction, computation: dict[str, Instruction]) -> float:
    """Counts the memory traffic of an instruction that is not fused."""
    operands = [computation[name].kind for name in one.operands if name in computation]
    if one.opcode in _SLICES:
        moved = size(one.kind, everywhere=True)
        return sum(moved for kind in (operands[0], one.kind) if size(kind))
    if one.opcode == "dynamic-update-slice":
        moved = size(operands[1], everywhere=True)
        return sum(moved for kind in operands[:2] if size(kind))
    if one.opcode.endswith("-start"):  # the result repeats the operand
        return max(size(one.kind), sum(map(size, operands)))
    return size(one.kind) + sum(map(size, operands))


def _dot_flops(one: Instruction, computation: dict[str, Instruction]) -> float:
    left = _dimensions(one.operands[0], computation)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.details)
    shared = math.prod(left[int(axis)] for axis in contracted[1].split(",") if axis) if contracted else 1
    return 2.0 * math.prod(next(_arrays(one.kind))[1]) * shared


def _convolution_flops(one: Instruction, computation: dict[str, Instruction]) -> float:
    """Counts a convolution: on TPUs matrix products are convolutions, with batch axes as windows of which only one place falls on data."""
    left, right, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.details).groups()
    data, kernel = (_dimensions(name, computation) for name in one.operands)
    result = next(_arrays(one.kind))[1]
    flops = 2.0 * result[out.index("b")] * result[out.index("f")] * kernel[right.index("i")]
    window = re.search(r"window=\{([^}]*)\}", one.details)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    for axis in itertools.takewhile(lambda axis: str(axis) in out, itertools.count()):

        def of(name: str, default: str, axis: int = axis) -> str:
            return fields[name].split("x")[axis] if name in fields else default

        label = str(axis)
        before = int(of("pad", "0_0").split("_")[0])
        stride, left_step, right_step = (int(of(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        extent = (data[left.index(label)] - 1) * left_step + 1
        flops *= _places(result[out.index(label)], kernel[right.index(label)], extent, stride, before, left_step, right_step)
    return flops


@functools.cache
def _places(outputs: int, taps: int, extent: int, stride: int, before: int, left_step: int, right_step: int) -> int:
    """Counts the pairs of an output and a tap of the window that fall on data, along one axis."""
    positions = (out * stride - before + tap * right_step for out in range(outputs) for tap in range(taps))
    return sum(0 <= position < extent and position % left_step == 0 for position in positions)


def group_size(details: str) -> int:
    """Counts the chips that take part in a collective; raises ValueError for groups in an unknown form."""
    if "source_target_pairs=" in details:
        return 2
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", details):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", details):
        return int(match[2])
    # Axes of a mesh, which may list the order of its chips; a part of an axis is written 'axis_0':(1)4.
    if match := re.search(r"replica_groups=\S*mesh\w*\[([^\]]*)\](?:, device_ids=\S+)?\s*\{([^}]*)\}", details):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    raise ValueError(f"chips of a collective in an unknown form: {details[:200]}")
