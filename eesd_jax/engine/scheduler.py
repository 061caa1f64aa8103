"""Continuous batching: many responses through a fixed number of rows, where a row that is finished is given the next prompt.

The jitted loop of `decode/loop.py` (or rounds of EESD) runs for a chunk of steps; then the host takes the text of finished rows, and a
second jitted program runs the next prompts and writes their tokens, caches and settings over those rows, in place. So rows never wait for
the slowest one. What a response says follows from its own prompt, key and temperature: the shapes of all that is computed for it (padded
prompt, cache capacity, rows of a device) do not depend on what runs beside it. (Except with a controller that chooses one draft length for
the batch: there sampled responses follow the same law, but not the same draws.)

Responses to the same prompt follow each other, and where rows are free for several of them, it is run once.

Several devices of this process each run their own rows (`shard_map` over the mesh's data axis); the weights may be split over the others.

Axes: D devices along data, B = D * R rows, G prompts of one prefill on a device, P padded prompt, S capacity in tokens.
"""

import functools
import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eesd_jax.config import DraftConfig, RefillConfig
from eesd_jax.decode import loop
from eesd_jax.decode import round as speculative
from eesd_jax.decode.controllers import Controller
from eesd_jax.decode.draft import Speculation
from eesd_jax.decode.sampling import Sampling
from eesd_jax.decode.state import EOS, LENGTH, RUNNING, DecodeState, ExitState
from eesd_jax.engine.engine import Engine
from eesd_jax.engine.kept import Keep, Kept, cut, no_kept
from eesd_jax.model import cache as kv
from eesd_jax.model import llama, ops, sharding, stored
from eesd_jax.model.config import ModelConfig
from eesd_jax.model.exit_branch import ExitBranch

_CAPACITY_STEP = 64


class Request(NamedTuple):
    """index: whose response it is; its draws follow from it. prompt: token ids. temperature: 0 is greedy. limit: the most new tokens."""

    index: int
    prompt: list[int]
    temperature: float
    limit: int


class Response(NamedTuple):
    """index: of its request. tokens: int32, the new ones, with the EOS that ended them. ended: whether one did. kept: if it was wanted."""

    index: int
    tokens: np.ndarray
    ended: bool
    kept: Kept | None = None


class _Rows(NamedTuple):
    """On the devices: the state of all rows, how each draws, and what is kept of them, [B, S, ...] each (None: nothing)."""

    state: DecodeState
    sampling: Sampling
    kept: Kept | None

    @property
    def finish(self) -> jax.Array:
        """Says which rows are finished, as a `DecodeState` does: `loop.decode` reads it."""
        return self.state.finish


class _Prompts(NamedTuple):
    """What one call of the refill program takes: G prompts a device, and up to R requests that they are of.

    tokens: int32 [D * G, P]. length, limit: int32 [D * G]. Of each request, [D * R]: prompt, int32, which of the G it has; index, uint32;
    temperature, float32; row, int32, where it goes among the device's own rows. count: int32 [D], how many requests there are.
    """

    tokens: np.ndarray
    length: np.ndarray
    limit: np.ndarray
    prompt: np.ndarray
    index: np.ndarray
    temperature: np.ndarray
    row: np.ndarray
    count: np.ndarray


class _Static(NamedTuple):
    """What is compiled in. draft and controller are None in plain decoding, keep is None where nothing is kept."""

    config: ModelConfig
    draft: DraftConfig | None
    controller: Controller | None
    mesh: Mesh
    capacity: int
    chunk: int  # tokens of one prefill pass
    keep: Keep | None

    @property
    def exit_layer(self) -> int:
        return self.draft.exit_layer if self.draft else self.config.num_layers


def _over_data(static: _Static, function: Any, in_specs: Any, out_specs: Any) -> Any:
    """Each device along the data axis on its own rows; the other axes are left to the compiler."""
    return jax.shard_map(function, mesh=static.mesh, in_specs=in_specs, out_specs=out_specs, axis_names={"data"}, check_vma=False)


_OWN, _SHARED = PartitionSpec("data"), PartitionSpec()


@functools.partial(jax.jit, static_argnames=("static", "rows"))
def _empty(static: _Static, rows: int, params: llama.Params, branch: ExitBranch | None) -> _Rows:
    """Rows without text, `rows` on each device: finished before they began."""

    def build() -> _Rows:
        dtype, capacity = params["final_norm"].dtype, static.capacity
        ones = jnp.ones(rows, jnp.int32)
        keys = jax.vmap(jax.random.key)(jnp.zeros(rows, jnp.uint32))
        tokens = jnp.zeros((rows, capacity), jnp.int32)
        cache = kv.empty(static.config, rows, capacity, dtype)
        state = DecodeState(tokens, ones, ones * 1, ones * LENGTH, keys, cache, None)
        if static.controller is not None:
            exits = loop.empty_exits(static.config, branch, rows, capacity, dtype)
            state = speculative.start_drafting(static.draft, branch, static.controller, state, exits)
        zeros = jnp.zeros(rows)
        kept = None if static.keep is None else no_kept(static.keep, static.config.hidden_size, (rows, capacity))
        return _Rows(state, Sampling(zeros, jnp.zeros(rows, jnp.int32), jnp.ones(rows), zeros * 1), kept)

    return _over_data(static, build, (), _OWN)()


def _prefill(
    static: _Static, params: llama.Params, branch: ExitBranch | None, prompts: _Prompts, keys: jax.Array
) -> tuple[DecodeState, ExitState | None, loop.Seen | None]:
    """Runs prompts, and returns their state, what drafting takes from here, and what is to be kept of the pass."""
    of_rows, padded = (prompts.tokens, prompts.length, prompts.limit, keys), prompts.tokens.shape[1]
    # The capacity is that of the prompts: of the rows that they go into, the rest of the caches stays as it is.
    if static.keep is not None:
        state, seen = loop.prefill_seen(static.config, params, *of_rows, exit_layer=static.keep.exit_layer, capacity=padded)
        return state, None, seen
    shapes = {"exit_layer": static.exit_layer, "capacity": padded, "chunk": static.chunk}
    return *loop.prefill(static.config, params, branch, *of_rows, **shapes), None


@functools.partial(jax.jit, static_argnames=("static",), donate_argnames=("rows",))
def _refill(static: _Static, params: llama.Params, branch: ExitBranch | None, key: jax.Array, prompts: _Prompts, rows: _Rows) -> _Rows:
    """Runs prompts, and puts them into their rows.

    Args:
      key: of the whole run; a response's own is `fold_in(key, index)`.
    """

    def refill(params: llama.Params, branch: ExitBranch | None, key: jax.Array, prompts: _Prompts, rows: _Rows) -> _Rows:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, prompts.index)
        no_keys = jnp.broadcast_to(key, prompts.length.shape)  # the prompts' own draw nothing
        new, exits, seen = _prefill(static, params, branch, prompts, no_keys)
        if static.controller is not None:
            new = speculative.start_drafting(static.draft, branch, static.controller, new, exits)

        def place(i: jax.Array, rows: _Rows) -> _Rows:
            def write(old: jax.Array, fresh: jax.Array, which: jax.Array = prompts.prompt[i]) -> jax.Array:
                one = jax.lax.dynamic_slice_in_dim(fresh, which, 1)
                return jax.lax.dynamic_update_slice(old, one, (prompts.row[i], *[0] * (old.ndim - 1)))

            state = jax.tree.map(write, rows.state, new)
            temperature = write(rows.sampling.temperature, prompts.temperature, i)
            state, kept = state._replace(row_keys=write(rows.state.row_keys, keys, i)), rows.kept
            if seen is not None:
                hidden, last = (write(old, fresh.astype(old.dtype)) for old, fresh in zip(kept[:2], seen, strict=True))
                kept = kept._replace(hidden=hidden, last=last)
            return _Rows(state, rows.sampling._replace(temperature=temperature), kept)

        return jax.lax.fori_loop(0, prompts.count[0], place, rows)

    return _over_data(static, refill, (_SHARED, _SHARED, _SHARED, _OWN, _OWN), _OWN)(params, branch, key, prompts, rows)


def _kept_step(static: _Static, eos_ids: jax.Array, params: llama.Params, rows: _Rows) -> _Rows:
    """Takes a plain step, and keeps what its pass finds at the token that it runs."""
    ran = jnp.arange(rows.state.length.shape[0]), rows.state.length - 1
    state, seen, logits = loop.seen_step(static.config, static.keep.exit_layer, eos_ids, params, rows.sampling, rows.state)
    log_probs, ids = ops.top_k(jax.nn.log_softmax(logits), static.keep.top_tokens)
    found = Kept(hidden=seen.hidden[:, 0], last=seen.last[:, 0], ids=ids, log_probs=log_probs)
    kept = jax.tree.map(lambda old, new: old.at[ran].set(new.astype(old.dtype)), rows.kept, found)
    return rows._replace(state=state, kept=kept)


@functools.partial(jax.jit, static_argnames=("static",), donate_argnames=("rows",))
def _decode(
    static: _Static, eos_ids: jax.Array, params: llama.Params, branch: ExitBranch | None, rows: _Rows, max_steps: jax.Array
) -> _Rows:
    """Up to `max_steps` steps (rounds) of every row."""

    def decode(eos_ids: jax.Array, params: llama.Params, branch: ExitBranch | None, rows: _Rows, max_steps: jax.Array) -> _Rows:
        if static.keep is not None:
            return loop.decode(functools.partial(_kept_step, static, eos_ids, params), rows, max_steps)
        if static.controller is None:
            step = functools.partial(loop.plain_step, static.config, eos_ids, params, rows.sampling)
        else:
            spec = Speculation(
                config=static.config,
                draft=static.draft,
                controller=static.controller,
                eos_ids=eos_ids,
                params=params,
                branch=branch,
                sampling=rows.sampling,
            )
            step = functools.partial(speculative.round_step, spec)
        return rows._replace(state=loop.decode(step, rows.state, max_steps))

    return _over_data(static, decode, (_SHARED, _SHARED, _SHARED, _OWN, _SHARED), _OWN)(eos_ids, params, branch, rows, max_steps)


def local_mesh(model_parallel: int = 1) -> Mesh:
    """A mesh of this process's devices, on which the weights are split over as many of them as divides both their number and this one.

    Args:
      model_parallel: over how many devices; negative: over all.
    """
    devices = jax.local_devices()
    tensor = math.gcd(model_parallel, len(devices)) if model_parallel > 0 else len(devices)
    return sharding.make_mesh(devices, data=len(devices) // tensor, tensor=tensor)


class Refiller:
    """Runs requests on the devices of one mesh.

    Args:
      engine: the model; where there is a controller, with a drafter.
      mesh: of this process's devices, with the axes of `model/sharding.py`.
      rows: of all devices, a multiple of the mesh's data axis.
      controller: how to draft; None for plain decoding.
      config: shapes and pacing.
      keep: what is kept of the passes, in plain decoding of prompts of one pass; None for nothing.
    """

    def __init__(
        self,
        engine: Engine,
        mesh: Mesh,
        rows: int,
        controller: Controller | None = None,
        config: RefillConfig = RefillConfig(),
        keep: Keep | None = None,
    ):
        assert keep is None or controller is None
        model, self._keep = engine.model, keep
        self._devices = mesh.shape["data"]
        assert rows % self._devices == 0, (rows, self._devices)
        self._rows = rows // self._devices
        # Wider passes gain nothing on CPU, and would often be padded with prompts that there are not.
        self._prefill_rows = 1 if _platform(mesh) == "cpu" else min(config.prefill_rows, self._rows)
        self._config = config
        self._mesh = mesh
        self._model_config = model.config
        everywhere, own = NamedSharding(mesh, _SHARED), NamedSharding(mesh, _OWN)
        self._own, self._everywhere = own, everywhere
        # Weights that no axis splits are read as `generate` reads them: as the codes of their file, where kernels do.
        split = mesh.size > self._devices
        params, branch = stored.dense((engine.params, engine.branch)) if split else (engine.params, engine.branch)
        self._params = jax.device_put(params, sharding.param_shardings(model.config, mesh, model.quantize) if split else everywhere)
        self._controller = controller
        drafter = engine.drafter if controller is not None else None
        self._draft = drafter.draft if drafter else None
        self._branch = jax.device_put(branch, everywhere) if drafter else None
        self._eos_ids = jax.device_put(np.array(model.eos_ids, np.int32), everywhere)
        self._steps = jax.device_put(np.int32(config.chunk), everywhere)

    def padded(self, prompt_tokens: int) -> int:
        """P for a prompt of that many tokens."""
        return _bucket(self._config.prompt_buckets, prompt_tokens)

    def _room(self, request: Request) -> int:
        """S for a request: of the bucket of its prompt, so that it depends on nothing else."""
        # A round writes up to max_draft + 1 entries behind a row's last but one token, whatever the limit.
        drafts = self._draft.max_draft + 1 if self._draft else 0
        prompt = _bucket(self._config.cache_buckets, self.padded(len(request.prompt)))
        return -(-(prompt + request.limit + drafts) // _CAPACITY_STEP) * _CAPACITY_STEP

    def run(self, requests: Iterable[Request], key: jax.Array) -> Iterator[Response]:
        """Yields every request's response, in the order in which they end.

        Args:
          requests: any number; each prompt is at least one token, and prompt and limit fit into the model's context.
          key: PRNG key; a response's draws follow from it and the request's index.
        """
        by_room: dict[int, list[Request]] = {}
        for request in requests:
            by_room.setdefault(self._room(request), []).append(request)
        for room, some in sorted(by_room.items()):
            # By padded length, which one prefill has in common; what answers the same prompt together, so that it is run once.
            first: dict[tuple[int, ...], int] = {}
            for request in some:
                first[*request.prompt] = min(first.get(tuple(request.prompt), request.index), request.index)
            some.sort(key=lambda request: (self.padded(len(request.prompt)), first[*request.prompt], request.index))
            yield from self._run(deque(some), room, key)

    def _run(self, queue: deque[Request], capacity: int, key: jax.Array) -> Iterator[Response]:
        chunk = self._config.prompt_buckets[-1]
        static = _Static(self._model_config, self._draft, self._controller, self._mesh, capacity, chunk, self._keep)
        key = jax.device_put(key, self._everywhere)
        rows = _empty(static, self._rows, self._params, self._branch)
        owners: list[Request | None] = [None] * (self._devices * self._rows)
        ended: list[Response] = []
        while queue or any(owners):
            while queue and not all(owners):
                prompts = self._take(queue, owners)
                rows = _refill(static, self._params, self._branch, key, jax.device_put(prompts, self._own), rows)
            rows = _decode(static, self._eos_ids, self._params, self._branch, rows, self._steps)
            yield from ended  # while the devices work
            finish = jax.device_get(rows.state.finish)
            done = [i for i, owner in enumerate(owners) if owner and finish[i] != RUNNING]
            ended = _responses(rows, done, owners) if done else []
            for i in done:
                owners[i] = None
        yield from ended

    def _take(self, queue: deque[Request], owners: list[Request | None]) -> _Prompts:
        """The next requests whose prompts are of one padded length, given to free rows, whose owners they become."""
        count, padded = self._prefill_rows, self.padded(len(queue[0].prompt))
        size, places = self._devices * count, self._devices * self._rows
        prompts = _Prompts(
            tokens=np.zeros((size, padded), np.int32),
            length=np.ones(size, np.int32),
            limit=np.ones(size, np.int32),
            prompt=np.zeros(places, np.int32),
            index=np.zeros(places, np.uint32),
            temperature=np.zeros(places, np.float32),
            row=np.zeros(places, np.int32),
            count=np.zeros(self._devices, np.int32),
        )
        for device in range(self._devices):
            run: list[tuple[list[int], int]] = []  # prompts of this device, with their limits
            for row in range(self._rows):
                if owners[owner := device * self._rows + row] is not None:
                    continue
                if not queue or self.padded(len(queue[0].prompt)) != padded:
                    break
                same = (queue[0].prompt, queue[0].limit)
                if not run or run[-1] != same:
                    if len(run) == count:
                        break
                    place, length = device * count + len(run), len(same[0])
                    prompts.tokens[place, :length] = same[0]
                    prompts.length[place], prompts.limit[place] = length, length + same[1]
                    run.append(same)
                request = owners[owner] = queue.popleft()
                place = device * self._rows + prompts.count[device]
                prompts.prompt[place], prompts.row[place] = len(run) - 1, row
                prompts.index[place], prompts.temperature[place] = request.index, request.temperature
                prompts.count[device] += 1
        return prompts


def _responses(rows: _Rows, done: list[int], owners: list[Request | None]) -> list[Response]:
    """Copies the text of rows that are finished, and what is kept of it, to the host.

    They are copies because on a CPU the host's arrays are those that the next program is given to write into.
    """
    length, finish, tokens, kept = jax.device_get((rows.state.length, rows.state.finish, rows.state.tokens, rows.kept))
    found = []
    for i in done:
        prompt, end = len(owners[i].prompt), length[i]
        of_row = None if kept is None else cut(kept, i, prompt, end)
        found.append(Response(owners[i].index, np.array(tokens[i, prompt:end]), bool(finish[i] == EOS), of_row))
    return found


def _platform(mesh: Mesh) -> str:
    return mesh.devices.flat[0].platform


def _bucket(sizes: tuple[int, ...], needed: int) -> int:
    """The least of the sizes that is enough, or a multiple of the last one."""
    return next((size for size in sizes if needed <= size), -(-needed // sizes[-1]) * sizes[-1])
