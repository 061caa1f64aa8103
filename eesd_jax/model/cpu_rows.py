"""A few rows times a matrix on CPU, at the speed at which memory gives the matrix.

Decoding multiplies 1 to about 17 rows by every weight. One row XLA's CPU backend multiplies at memory speed (as a batch of products), but
from two rows on it uses a library made for large products, which rearranges the whole matrix first: two rows then cost nearly twice
one, and verifying drafts would cost what it saves. Here every weight is read once, whatever the number of rows, and used for all of them,
and while some weights are multiplied memory brings the next: 9 rows cost little more than one.

The kernel is written in LLVM's language, compiled for the machine it runs on, and called by XLA through its foreign function interface (the
struct offsets below are those of `xla/ffi/api/c_api.h`, version 0.x, which only ever grows at the end). Every output is summed in the same
order whatever the number of rows, so a pass of several tokens gives the very numbers of passes of one token each.

Axes: R rows, I inputs, O outputs.
"""

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from llvmlite import binding, ir

# With more rows than this, XLA's own product is as fast.
MAX_ROWS = 64
_MAX_CORES = 16
_CHUNKS_PER_CORE = 4
_BLOCK_OUTPUTS = 4
_LANES = 16
TARGET = "eesd_jax_rows_by_matrix"
_ENGINES: list[binding.ExecutionEngine] = []  # own the code that XLA calls
_I32, _I64, _F32, _BYTES = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.IntType(8).as_pointer()


# Set (`with on_mesh(True):`) where weights are split over devices: then products are XLA's, which knows how to split them.
on_mesh = jax.make_user_context(False)


def usable(rows: int, weight_OxI: jax.Array) -> bool:
    """Whether `rows_by_matrix` can take this product: float32 on a CPU, few rows, and sizes that divide evenly."""
    outputs, inputs = weight_OxI.shape
    if rows > MAX_ROWS or weight_OxI.dtype != jnp.float32 or outputs % _BLOCK_OUTPUTS or inputs % _LANES:
        return False
    return jax.default_backend() == "cpu" and not on_mesh.value


@functools.cache
def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MAX_CORES)


@jax.custom_jvp
def rows_by_matrix(x_RxI: jax.Array, weight_OxI: jax.Array) -> jax.Array:
    """Float32 [R, I] times [O, I], giving [R, O]; see `usable`."""
    register()
    result = jax.ShapeDtypeStruct((x_RxI.shape[0], weight_OxI.shape[0]), jnp.float32)
    # Several chunks a core, so that a core that comes late leaves its share to the others.
    chunks = min(weight_OxI.shape[0] // _BLOCK_OUTPUTS, _CHUNKS_PER_CORE * _cores())
    return jax.ffi.ffi_call(TARGET, result)(x_RxI, weight_OxI, chunks=np.int64(chunks), helpers=np.int64(_cores() - 1))


@rows_by_matrix.defjvp
def _rows_by_matrix_jvp(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x, weight), (dx, dweight) = primals, tangents
    highest = jax.lax.Precision.HIGHEST
    change = jnp.einsum("ri,oi->ro", dx, weight, precision=highest) + jnp.einsum("ri,oi->ro", x, dweight, precision=highest)
    return rows_by_matrix(x, weight), change


@functools.cache
def register() -> None:
    """Compiles the kernel and makes it known to XLA, once."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features()
    target = binding.Target.from_default_triple()
    machine = target.create_target_machine(cpu=binding.get_host_cpu_name(), features=features.flatten(), opt=3)
    wide = features.get("avx512f", False)
    # Sums of a block live in vector registers: 32 of 16 lanes, or 16 of 8 lanes and fewer.
    module = binding.parse_assembly(str(_handler_module(lanes=16 if wide else 8, max_rows=4 if wide else 2)))
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    jax.ffi.register_ffi_target(TARGET, new_capsule(engine.get_function_address("handler"), None, None), platform="cpu")
    _ENGINES.append(engine)


@contextlib.contextmanager
def _loop(builder: ir.IRBuilder, count: ir.Value, step: int) -> Iterator[ir.Value]:
    """Code in this context runs for 0, step, 2 step, ... below count."""
    before = builder.block
    head, body, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(_I64)
    index.add_incoming(_I64(0), before)
    builder.cbranch(builder.icmp_signed("<", index, count), body, after)
    builder.position_at_end(body)
    yield index
    index.add_incoming(builder.add(index, _I64(step)), builder.block)
    builder.branch(head)
    builder.position_at_end(after)


def _intrinsic(module: ir.Module, name: str, result: ir.Type, *arguments: ir.Type) -> ir.Function:
    return module.globals.get(name) or ir.Function(module, ir.FunctionType(result, arguments), name)


def _add_block(module: ir.Module, rows: int, lanes: int, ahead: int) -> ir.Function:
    """`block(x, w, out, inputs, outputs, next)`: the products of `rows` rows of x with `_BLOCK_OUTPUTS` rows of w.

    On its way it asks memory for `ahead` rows that begin at `next`.
    """
    vector = ir.VectorType(_F32, lanes)
    floats = _F32.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), (floats, floats, floats, _I64, _I64, floats))
    function = ir.Function(module, kind, f"block_of_{rows}_ahead_{ahead}")
    function.linkage = "internal"
    x, w, out, inputs, outputs, following = function.args
    fma = _intrinsic(module, f"llvm.fma.v{lanes}f32", vector, vector, vector, vector)
    prefetch = _intrinsic(module, "llvm.prefetch.p0i8", ir.VoidType(), _BYTES, _I32, _I32, _I32)
    total = _intrinsic(module, f"llvm.vector.reduce.fadd.v{lanes}f32", _F32, _F32, vector)
    entry = function.append_basic_block("entry")
    builder = ir.IRBuilder(entry)
    x_rows = [builder.gep(x, [builder.mul(inputs, _I64(r))]) for r in range(rows)]
    w_rows = [builder.gep(w, [builder.mul(inputs, _I64(o))]) for o in range(_BLOCK_OUTPUTS)]
    next_rows = [builder.gep(following, [builder.mul(inputs, _I64(o))]) for o in range(ahead)]
    cells = [(r, o) for r in range(rows) for o in range(_BLOCK_OUTPUTS)]
    head, body, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
    builder.branch(head)

    builder.position_at_end(head)
    i = builder.phi(_I64)
    i.add_incoming(_I64(0), entry)
    sums = {cell: builder.phi(vector) for cell in cells}
    for phi in sums.values():
        phi.add_incoming(ir.Constant(vector, [0.0] * lanes), entry)
    builder.cbranch(builder.icmp_signed("<", i, inputs), body, after)

    builder.position_at_end(body)

    def load(row: ir.Value) -> ir.Value:
        return builder.load(builder.bitcast(builder.gep(row, [i]), vector.as_pointer()), align=4)

    for row in next_rows:  # to read, into the second-level cache, data
        builder.call(prefetch, (builder.bitcast(builder.gep(row, [i]), _BYTES), _I32(0), _I32(2), _I32(1)))
    weights = [load(row) for row in w_rows]
    for r, row in enumerate(x_rows):
        values = load(row)
        for o, weight in enumerate(weights):
            sums[r, o].add_incoming(builder.call(fma, (values, weight, sums[r, o])), body)
    i.add_incoming(builder.add(i, _I64(lanes)), body)
    builder.branch(head)

    builder.position_at_end(after)
    for r, o in cells:
        address = builder.gep(out, [builder.add(builder.mul(outputs, _I64(r)), _I64(o))])
        builder.store(builder.call(total, (_F32(0.0), sums[r, o]), fastmath=("reassoc",)), address)
    builder.ret_void()
    return function


# What the threads that share one product know, 64-bit words: three addresses, four sizes, and three counters that only atomics touch.
_JOB = ("x", "w", "out", "rows", "inputs", "outputs", "chunks", "next", "done", "users")


def _field(builder: ir.IRBuilder, struct: ir.Value, offset: int, kind: ir.Type) -> ir.Value:
    """Pointer to the field of that type at an offset in bytes."""
    return builder.bitcast(builder.gep(struct, [_I64(offset)]), kind.as_pointer())


def _add_task(module: ir.Module, max_rows: int, lanes: int) -> ir.Function:
    """`task(job)`: takes chunks of the outputs until there are no more. The last of the job's users frees it."""
    blocks = {(rows, ahead): _add_block(module, rows, lanes, ahead) for rows in range(1, max_rows + 1) for ahead in (1, 2, 4)}
    free = ir.Function(module, ir.FunctionType(ir.VoidType(), (_BYTES,)), "free")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), (_BYTES,)), "task")
    (job,) = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    words = {name: _field(builder, job, 8 * i, _I64) for i, name in enumerate(_JOB)}
    head, body, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
    builder.branch(head)

    builder.position_at_end(head)
    chunk = builder.atomic_rmw("add", words["next"], _I64(1), "seq_cst")
    chunks = builder.load(words["chunks"])
    builder.cbranch(builder.icmp_signed("<", chunk, chunks), body, after)

    builder.position_at_end(body)
    x, w, out = (builder.inttoptr(builder.load(words[name]), _F32.as_pointer()) for name in ("x", "w", "out"))
    rows, inputs, outputs = (builder.load(words[name]) for name in ("rows", "inputs", "outputs"))
    whole_rows = builder.mul(builder.sdiv(rows, _I64(max_rows)), _I64(max_rows))
    remaining = builder.sub(rows, whole_rows)

    def boundary(index: ir.Value) -> ir.Value:
        share = builder.sdiv(builder.mul(builder.sdiv(outputs, _I64(_BLOCK_OUTPUTS)), index), chunks)
        return builder.mul(share, _I64(_BLOCK_OUTPUTS))

    first = boundary(chunk)
    count = builder.sub(boundary(builder.add(chunk, _I64(1))), first)
    with _loop(builder, count, _BLOCK_OUTPUTS) as offset:
        # Four rows of w stay in the first-level cache while all rows of x pass by; meanwhile the next four come from memory.
        o = builder.add(first, offset)
        w_block = builder.gep(w, [builder.mul(o, inputs)])
        last = builder.icmp_signed(">=", builder.add(offset, _I64(_BLOCK_OUTPUTS)), count)

        def run(rows_at_once: int, row: ir.Value) -> None:
            x_block = builder.gep(x, [builder.mul(row, inputs)])
            out_block = builder.gep(out, [builder.add(builder.mul(row, outputs), o)])
            # Spread over the passes: all four at once, two and two, or one by one.
            one = builder.icmp_signed("<=", rows, _I64(max_rows))
            few = builder.icmp_signed("<=", rows, _I64(3 * max_rows))
            block = builder.select(one, blocks[rows_at_once, 4], builder.select(few, blocks[rows_at_once, 2], blocks[rows_at_once, 1]))
            ahead = builder.select(one, _I64(4), builder.select(few, _I64(2), _I64(1)))
            skip = builder.mul(ahead, builder.sdiv(row, _I64(max_rows)))
            done = builder.or_(last, builder.icmp_signed(">=", skip, _I64(_BLOCK_OUTPUTS)))
            skip = builder.select(done, _I64(0), builder.add(skip, _I64(_BLOCK_OUTPUTS)))
            following = builder.gep(w_block, [builder.mul(skip, inputs)])
            builder.call(block, (x_block, w_block, out_block, inputs, outputs, following))

        with _loop(builder, whole_rows, max_rows) as row:
            run(max_rows, row)
        for rows_at_once in range(1, max_rows):
            with builder.if_then(builder.icmp_signed("==", remaining, _I64(rows_at_once))):
                run(rows_at_once, whole_rows)
    builder.atomic_rmw("add", words["done"], _I64(1), "seq_cst")
    builder.branch(head)

    builder.position_at_end(after)
    users = builder.atomic_rmw("sub", words["users"], _I64(1), "seq_cst")
    with builder.if_then(builder.icmp_signed("==", users, _I64(1))):
        builder.call(free, (job,))
    builder.ret_void()
    return function


def _handler_module(lanes: int, max_rows: int) -> ir.Module:
    """`handler(frame)`, an `XLA_FFI_Handler`; attributes: `chunks` to cut the outputs into, and `helpers` to ask the thread pool for.

    A helper may come late, or never while this call runs: whoever is there takes the next chunk, and this call waits only for chunks
    that were taken. The job outlives the call until its last helper has looked at it.
    """
    module = ir.Module("rows_by_matrix")
    task = _add_task(module, max_rows, lanes)
    malloc = ir.Function(module, ir.FunctionType(_BYTES, (_I64,)), "malloc")
    function = ir.Function(module, ir.FunctionType(_BYTES, (_BYTES,)), "handler")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    (frame,) = function.args
    success = ir.Constant(_BYTES, None)

    def field(struct: ir.Value, offset: int, kind: ir.Type = _BYTES) -> ir.Value:
        return builder.load(_field(builder, struct, offset, kind))

    extension = field(frame, 8)
    with builder.if_then(builder.icmp_unsigned("!=", extension, success)):  # asks which version of the interface this is for: 0.1
        metadata = field(extension, 24)
        for offset, value in ((24, 0), (28, 1)):
            builder.store(_I32(value), _field(builder, metadata, offset, _I32))
        builder.ret(success)
    api, context = field(frame, 16), field(frame, 24)
    arguments, results, attributes = field(frame, 72), field(frame, 112), field(frame, 160)
    x, w, out = field(arguments, 0), field(arguments, 8), field(results, 0)
    chunks, helpers = (field(field(field(attributes, offset), 8), 0, _I64) for offset in (0, 8))
    rows, inputs = (field(field(x, 40), offset, _I64) for offset in (0, 8))
    outputs = field(field(out, 40), 8, _I64)

    job = builder.call(malloc, (_I64(8 * len(_JOB)),))
    zero, users = _I64(0), builder.add(helpers, _I64(2))  # the helpers, and this call twice: it looks at the job once more at the end
    values = (*(field(buffer, 24, _I64) for buffer in (x, w, out)), rows, inputs, outputs, chunks, zero, zero, users)
    for i, value in enumerate(values):
        builder.store(value, _field(builder, job, 8 * i, _I64))
    request = builder.alloca(_I64, size=5)
    request = builder.bitcast(request, _BYTES)
    builder.store(_I64(40), _field(builder, request, 0, _I64))
    builder.store(success, _field(builder, request, 8, _BYTES))
    builder.store(context, _field(builder, request, 16, _BYTES))
    builder.store(builder.bitcast(task, _BYTES), _field(builder, request, 24, _BYTES))
    builder.store(job, _field(builder, request, 32, _BYTES))
    schedule = builder.load(_field(builder, api, 136, ir.FunctionType(_BYTES, (_BYTES,)).as_pointer()))
    with _loop(builder, helpers, 1):
        builder.call(schedule, (request,))
    builder.call(task, (job,))

    waiting, finished = builder.append_basic_block("waiting"), builder.append_basic_block("finished")
    builder.branch(waiting)
    builder.position_at_end(waiting)
    done = builder.load_atomic(_field(builder, job, 8 * _JOB.index("done"), _I64), "acquire", 8)
    builder.cbranch(builder.icmp_signed("<", done, chunks), waiting, finished)
    builder.position_at_end(finished)
    builder.call(task, (job,))  # finds no chunk left, and lets go of the job
    builder.ret(success)
    return module
