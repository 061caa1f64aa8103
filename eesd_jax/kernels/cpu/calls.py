"""Kernels for CPU: written in LLVM's language, compiled for the machine they run on, and called by XLA as custom calls.

A kernel cuts its work into chunks. The thread that makes the call takes one chunk after the other, and so do those threads of XLA's pool
that happen to be free; XLA's foreign function interface gives the pool, and the struct offsets below are those of `xla/ffi/api/c_api.h`,
version 0.x, which only ever grows at the end.
"""

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from llvmlite import binding, ir

_MAX_CORES = 16
_ENGINES: list[binding.ExecutionEngine] = []  # own the code that XLA calls
I32, I64, F32, BYTES = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.IntType(8).as_pointer()
FLOATS = F32.as_pointer()
# Behind the words of a job: counters that only atomics touch.
_COUNTERS = ("next", "done", "users")


@functools.cache
def cores() -> int:
    """How many threads may share a kernel's work."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, _MAX_CORES)


class Registers(NamedTuple):
    """Vector registers of this machine: floats in one, and rows of four vectors each that fit into all of them, with some to spare."""

    lanes: int
    rows: int


@functools.cache
def registers() -> Registers:
    """This machine's."""
    return Registers(lanes=16, rows=4) if has_features("avx512f") else Registers(lanes=8, rows=2)


def has_features(*names: str) -> bool:
    """Whether this processor has all of these, by LLVM's names."""
    features = binding.get_host_cpu_features()
    return all(features.get(name, False) for name in names)


class Job(NamedTuple):
    """What all threads of one call know. words: name of each 64-bit word, in order. address: of the first."""

    words: Sequence[str]
    address: ir.Value

    def read(self, builder: ir.IRBuilder, name: str, behind: ir.Value | None = None) -> ir.Value:
        """A word: int64. With `behind` not that of the name, but of so many words behind it."""
        word = field(builder, self.address, 8 * self.words.index(name), I64)
        return builder.load(word if behind is None else builder.gep(word, [behind]))

    def floats(self, builder: ir.IRBuilder, name: str, behind: ir.Value | None = None) -> ir.Value:
        """A word that is an address of floats."""
        return builder.inttoptr(self.read(builder, name, behind), FLOATS)


# Adds a function `chunk(job, index)` to the module: (module, names of the job's words, registers) -> the function.
AddChunk = Callable[[ir.Module, Sequence[str], Registers], ir.Function]


def register(
    target: str, arguments: Sequence[Sequence[str]], results: Sequence[Sequence[str]], attributes: Sequence[str], add: AddChunk
) -> None:
    """Compiles a kernel and makes it known to XLA under that name.

    Args:
      arguments, results: for each buffer the words that it gives a job: the name of its address, then that of each of its axes' sizes.
      attributes: int64, in alphabetical order; all become words; `chunks` (how many) and `helpers` (threads to ask for) must be there.
      add: writes the code of one chunk.
    """
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    binding.initialize_native_asmparser()
    features = binding.get_host_cpu_features()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features.flatten(), opt=3
    )
    module = binding.parse_assembly(str(_handler_module(target, arguments, results, attributes, add)))
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    jax.ffi.register_ffi_target(target, new_capsule(engine.get_function_address("handler"), None, None), platform="cpu")
    _ENGINES.append(engine)


def start_chunk(module: ir.Module, words: Sequence[str]) -> tuple[ir.IRBuilder, Job, ir.Value]:
    """Begins a function `chunk(job, index)`: what writes its code (whose `function` it is), the job, and the index."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), (BYTES, I64)), "chunk")
    address, index = function.args
    return ir.IRBuilder(function.append_basic_block("entry")), Job(words, address), index


@contextlib.contextmanager
def _loop(
    builder: ir.IRBuilder, start: ir.Value, stop: ir.Value, step: int, initial: Sequence[ir.Value]
) -> Iterator[tuple[ir.Value, list[ir.Value], list[ir.Value]]]:
    """Yields the index, the carried values, and a list that the code in this context fills with the next ones."""
    before = builder.block
    head, body, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    index, *values = (builder.phi(value.type) for value in (start, *initial))
    for phi, value in zip((index, *values), (start, *initial), strict=True):
        phi.add_incoming(value, before)
    builder.cbranch(builder.icmp_signed("<", index, stop), body, after)
    builder.position_at_end(body)
    following: list[ir.Value] = []
    yield index, values, following
    for phi, value in zip((index, *values), (builder.add(index, I64(step)), *following), strict=True):
        phi.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(after)


@contextlib.contextmanager
def loop(builder: ir.IRBuilder, start: ir.Value, stop: ir.Value, step: int) -> Iterator[ir.Value]:
    """Code in this context runs for start, start + step, ... below stop."""
    with _loop(builder, start, stop, step, ()) as (index, _, _):
        yield index


def fold(
    builder: ir.IRBuilder,
    start: ir.Value,
    stop: ir.Value,
    step: int,
    initial: Sequence[ir.Value],
    body: Callable[[ir.Value, Sequence[ir.Value]], Sequence[ir.Value]],
) -> list[ir.Value]:
    """A loop that carries values in registers: `body(index, values)` gives the next ones."""
    with _loop(builder, start, stop, step, initial) as (index, values, following):
        following += body(index, values)
    return values


def split(pieces: int, chunks_per_core: int) -> dict[str, np.int64]:
    """Attributes of a kernel whose work has so many pieces; several chunks a core let one that comes late leave its share to the others."""
    chunks = min(pieces, chunks_per_core * cores())
    return {"chunks": np.int64(chunks), "helpers": np.int64(min(chunks, cores()) - 1)}


def share(builder: ir.IRBuilder, pieces: ir.Value, chunk: ir.Value, chunks: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The first piece of a chunk, and the first that is no longer its own."""
    first, end = (builder.sdiv(builder.mul(pieces, index), chunks) for index in (chunk, builder.add(chunk, I64(1))))
    return first, end


def splat(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """A value in every lane."""
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    one = builder.insert_element(undefined, value, I32(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def external(module: ir.Module, name: str, result: ir.Type, *arguments: ir.Type) -> ir.Function:
    """A function of LLVM or of the C library."""
    return module.globals.get(name) or ir.Function(module, ir.FunctionType(result, arguments), name)


def field(builder: ir.IRBuilder, struct: ir.Value, offset: int, kind: ir.Type) -> ir.Value:
    """Pointer to the field of that type at an offset in bytes."""
    return builder.bitcast(builder.gep(struct, [I64(offset)]), kind.as_pointer())


def _add_task(module: ir.Module, words: Sequence[str], chunk: ir.Function) -> ir.Function:
    """`task(job)`: takes chunks until there are no more. The last of the job's users frees it."""
    free = external(module, "free", ir.VoidType(), BYTES)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), (BYTES,)), "task")
    (job,) = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    counters = {name: field(builder, job, 8 * (len(words) + i), I64) for i, name in enumerate(_COUNTERS)}
    head, body, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
    builder.branch(head)

    builder.position_at_end(head)
    index = builder.atomic_rmw("add", counters["next"], I64(1), "seq_cst")
    builder.cbranch(builder.icmp_signed("<", index, Job(words, job).read(builder, "chunks")), body, after)

    builder.position_at_end(body)
    builder.call(chunk, (job, index))
    builder.atomic_rmw("add", counters["done"], I64(1), "seq_cst")
    builder.branch(head)

    builder.position_at_end(after)
    users = builder.atomic_rmw("sub", counters["users"], I64(1), "seq_cst")
    with builder.if_then(builder.icmp_signed("==", users, I64(1))):
        builder.call(free, (job,))
    builder.ret_void()
    return function


def _handler_module(
    name: str,
    arguments: Sequence[Sequence[str]],
    results: Sequence[Sequence[str]],
    attributes: Sequence[str],
    add: AddChunk,
) -> ir.Module:
    """`handler(frame)`, an `XLA_FFI_Handler`.

    A helper may come late, or never while this call runs: whoever is there takes the next chunk, and this call waits only for chunks
    that were taken. The job outlives the call until its last helper has looked at it.
    """
    module = ir.Module(name)
    words = [word for buffer in (*arguments, *results) for word in buffer] + list(attributes)
    task = _add_task(module, words, add(module, words, registers()))
    malloc = external(module, "malloc", BYTES, I64)
    function = ir.Function(module, ir.FunctionType(BYTES, (BYTES,)), "handler")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    (frame,) = function.args
    success = ir.Constant(BYTES, None)

    def read(struct: ir.Value, offset: int, kind: ir.Type = BYTES) -> ir.Value:
        return builder.load(field(builder, struct, offset, kind))

    extension = read(frame, 8)
    with builder.if_then(builder.icmp_unsigned("!=", extension, success)):  # asks which version of the interface this is for: 0.1
        metadata = read(extension, 24)
        for offset, value in ((24, 0), (28, 1)):
            builder.store(I32(value), field(builder, metadata, offset, I32))
        builder.ret(success)
    api, context = read(frame, 16), read(frame, 24)
    values = []
    for names, buffers in ((arguments, read(frame, 72)), (results, read(frame, 112))):
        for i, (_, *sizes) in enumerate(names):
            buffer = read(buffers, 8 * i)
            values.append(read(buffer, 24, I64))
            values += [read(read(buffer, 40), 8 * axis, I64) for axis in range(len(sizes))]
    given = read(frame, 160)
    values += [read(read(read(given, 8 * i), 8), 0, I64) for i in range(len(attributes))]
    chunks, helpers = (values[words.index(name)] for name in ("chunks", "helpers"))

    job = builder.call(malloc, (I64(8 * (len(words) + len(_COUNTERS))),))
    zero, users = I64(0), builder.add(helpers, I64(2))  # the helpers, and this call twice: it looks at the job once more at the end
    for i, value in enumerate([*values, zero, zero, users]):
        builder.store(value, field(builder, job, 8 * i, I64))
    request = builder.bitcast(builder.alloca(I64, size=5), BYTES)
    builder.store(I64(40), field(builder, request, 0, I64))
    for offset, value in ((8, success), (16, context), (24, builder.bitcast(task, BYTES)), (32, job)):
        builder.store(value, field(builder, request, offset, BYTES))
    schedule = builder.load(field(builder, api, 136, ir.FunctionType(BYTES, (BYTES,)).as_pointer()))
    with loop(builder, zero, helpers, 1):
        builder.call(schedule, (request,))
    builder.call(task, (job,))

    waiting, finished = builder.append_basic_block("waiting"), builder.append_basic_block("finished")
    builder.branch(waiting)
    builder.position_at_end(waiting)
    done = builder.load_atomic(field(builder, job, 8 * (len(words) + _COUNTERS.index("done")), I64), "acquire", 8)
    builder.cbranch(builder.icmp_signed("<", done, chunks), waiting, finished)
    builder.position_at_end(finished)
    builder.call(task, (job,))  # finds no chunk left, and lets go of the job
    builder.ret(success)
    return module
