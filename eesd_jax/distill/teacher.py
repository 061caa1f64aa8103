"""The frozen target, as training sees it: hidden states behind block N, and the distribution that the branch learns.

Online, every step runs it. In cached mode it runs once over all rows, and what a step needs is kept on disk, a file a kind, memory-mapped.

Axes: B rows, T tokens, D hidden, V vocabulary, K kept tokens.
"""

import json
import pathlib
import shutil
import time
import tokenize
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from eesd_jax import files
from eesd_jax.distill.data import Batch, Rows
from eesd_jax.distill.loss import TopTokens, join_positions, split_positions
from eesd_jax.errors import UserError
from eesd_jax.model import llama, ops, stored
from eesd_jax.model.config import ModelConfig
from eesd_jax.model.stored import Quantized

_SECONDS_TO_FLUSH = 60  # the most that a kill costs of a cache


class Trunk(NamedTuple):
    """The target's weights, with blocks stacked for `scan_blocks`.

    embed: [V, D]. early, late: blocks 1..N and N+1..L, leaves with a leading layers axis; none before an exit at 0. final_norm: [D].
    head: [V, D] (tied: `embed`). Matrices may be quantised.
    """

    embed: jax.Array | Quantized
    early: llama.Params
    late: llama.Params
    final_norm: jax.Array
    head: jax.Array | Quantized


class Features(NamedTuple):
    """What a step learns from, at every position.

    hidden: [B, T, D] behind block N. last: [B, T, D] behind the final norm, None where nothing needs it. top: what a cache kept of the
    distribution; None online, where it follows from `last`.
    """

    hidden: jax.Array
    last: jax.Array | None
    top: TopTokens | None


def split_trunk(config: ModelConfig, params: llama.Params, exit_layer: int) -> Trunk:
    """Stacks the blocks, weight by weight, and deletes what was stacked: the peak is the model and its largest stacked weight."""

    def stack_leaf(*leaves: jax.Array) -> jax.Array:
        home = stacked_home(leaves[0].sharding)
        stacked = jax.jit(_stack, out_shardings=home)(leaves).block_until_ready()
        for leaf in leaves:
            leaf.delete()
        return stacked

    def stack(blocks: tuple[llama.Params, ...]) -> llama.Params:
        return jax.tree.map(stack_leaf, *blocks) if blocks else {}

    head = params["embed"] if config.tie_embeddings else params["lm_head"]
    blocks = params["blocks"]
    return Trunk(params["embed"], stack(blocks[:exit_layer]), stack(blocks[exit_layer:]), params["final_norm"], head)


def stacked_home(home: Sharding) -> Sharding:
    """Where blocks lie that were stacked, by where each of them lay: the layers axis is not split."""
    return NamedSharding(home.mesh, PartitionSpec(None, *home.spec)) if isinstance(home, NamedSharding) else home


def _stack(leaves: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.stack(leaves)


def join_trunk(config: ModelConfig, trunk: Trunk) -> llama.Params:
    """The params that decoding wants, blocks apart: copies."""
    blocks = []
    for stacked in (trunk.early, trunk.late):
        blocks += [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(_depth(stacked))]
    params = {"embed": trunk.embed, "blocks": tuple(blocks), "final_norm": trunk.final_norm}
    return params if config.tie_embeddings else params | {"lm_head": trunk.head}


def _depth(stacked: llama.Params) -> int:
    return jax.tree.leaves(stacked)[0].shape[0] if stacked else 0


def attention_mask(segments_BxT: jax.Array) -> jax.Array:
    """Bool [B, T, T]: a token sees itself and what came before it in its own segment."""
    same = segments_BxT[:, :, None] == segments_BxT[:, None, :]
    return same & ops.causal_mask(segments_BxT.shape[1])


def hidden_states(
    config: ModelConfig, trunk: Trunk, batch: Batch, *, last: bool, rows_home: NamedSharding | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """One pass of the target: [B, T, D] behind block N and, if asked for, behind the final norm.

    Args:
      rows_home: where rows lie. Left to choose, XLA takes the hidden axis of the activations, as that of the embedding is split, runs every
        row on every chip, and sums whole activations over the chips after each product.
    """
    mask = attention_mask(batch.segments)
    x = stored.take_rows(trunk.embed, batch.tokens, trunk.final_norm.dtype)
    if rows_home is not None:
        x = jax.lax.with_sharding_constraint(x, rows_home)
    exit_layer = _depth(trunk.early)
    hidden = llama.scan_blocks(config, trunk.early, x, batch.positions, mask) if exit_layer else x
    if not last:
        return hidden, None
    x = llama.scan_blocks(config, trunk.late, hidden, batch.positions, mask, first=exit_layer)
    return hidden, llama.rms_norm(x, trunk.final_norm, config.norm_eps)


def teacher_logits(trunk: Trunk, last: jax.Array) -> jax.Array:
    """Float32 logits of normed last hidden states [..., D], over the whole vocabulary."""
    return ops.linear(last, trunk.head, preferred_element_type=jnp.float32)


def top_tokens(trunk: Trunk, last_BxTxD: jax.Array, count: int, chunk: int) -> TopTokens:
    """The most probable tokens at every position, logits of `chunk` positions of each row at a time."""

    def top(part_BxCxD: jax.Array) -> TopTokens:
        log_probs, ids = ops.top_k(jax.nn.log_softmax(teacher_logits(trunk, part_BxCxD)), count)
        return TopTokens(ids, log_probs)

    found = jax.lax.map(top, split_positions(last_BxTxD, chunk))
    return jax.tree.map(lambda x: join_positions(x, last_BxTxD.shape[1]), found)


class FeatureCache:
    """What the target says of every row of a split, on disk: written once, row after row, resumable.

    Attributes:
      rows: how many are written.

    Raises:
      UserError: the folder holds the features of another model, exit layer or data, or there is no room for them.
    """

    def __init__(
        self, folder: pathlib.Path, provenance: dict[str, Any], count: int, length: int, config: ModelConfig, *, top: int, last: bool
    ):
        self._folder, self._count, self._vocab_size = folder, count, config.vocab_size
        float_kind = provenance["dtype"]
        kinds = {"hidden": (float_kind, (config.hidden_size,)), "ids": ("int32", (top,)), "log_probs": (float_kind, (top,))}
        if last:
            kinds["last"] = (float_kind, (config.hidden_size,))
        described = provenance | {"rows": count, "length": length, "kinds": {name: [kind, *shape] for name, (kind, shape) in kinds.items()}}
        about = folder / "provenance.json"
        if about.exists():
            found = self._about(about)
            differences = [name for name in described if found.get(name) != described[name]]
            if differences:
                raise UserError(f"{folder} caches other features: it differs in {', '.join(differences)}; expected another cache.path")
        else:
            needed = sum(count * length * int(np.prod(shape)) * np.dtype(kind).itemsize for kind, shape in kinds.values())
            folder.mkdir(parents=True, exist_ok=True)
            if needed > (free := shutil.disk_usage(folder).free):
                raise UserError(
                    f"the cache of {count} rows needs {needed / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free; "
                    "expected fewer rows (data.max_examples), another cache.path, or cache.enabled=False"
                )
            for name, (kind, shape) in kinds.items():
                np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=kind, shape=(count, length, *shape)).flush()
            files.write_whole(about, json.dumps(described, indent=1))
        self._arrays = {name: self._open(name, np.dtype(kind), (count, length, *shape)) for name, (kind, shape) in kinds.items()}
        self.rows = self._rows_done(folder / "rows_done")

    def _about(self, path: pathlib.Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise self._damaged(error) from None
        return found if isinstance(found, dict) else {}

    def _open(self, name: str, kind: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        try:
            array = np.lib.format.open_memmap(self._folder / f"{name}.npy", mode="r+")
        except (OSError, ValueError, EOFError, SyntaxError, OverflowError, tokenize.TokenError, TypeError) as error:
            raise self._damaged(error) from None
        if (array.dtype, array.shape) != (kind, shape):
            raise self._damaged(f"{name}.npy is {array.dtype} {list(array.shape)}, not {kind} {list(shape)}")
        return array

    def _rows_done(self, path: pathlib.Path) -> int:
        try:
            rows = int(path.read_text(encoding="utf-8")) if path.exists() else 0
        except (OSError, ValueError) as error:
            raise self._damaged(error) from None
        if not 0 <= rows <= self._count:
            raise self._damaged(f"{path.name} is {rows}, of {self._count} rows")
        return rows

    def _damaged(self, reason: Any) -> UserError:
        told = " ".join(str(reason).split())[:200]
        return UserError(f"{self._folder} cannot be read ({told}); expected a whole cache: remove it, and it is written again")

    @property
    def complete(self) -> bool:
        return self.rows >= self._count

    def fill(self, rows: Rows, batch_size: int, compute: Callable[[Batch], Features]) -> Iterator[int]:
        """Writes what is missing; yields the number of rows written so far, after each batch."""
        last_flushed, flushed_at = self.rows, time.monotonic()
        while not self.complete:
            chosen = range(self.rows, min(self.rows + batch_size, self._count))
            parts = [rows[i] for i in chosen]
            parts += [parts[-1]] * (batch_size - len(parts))  # one shape, one program
            batch = Batch(*(np.stack(field) for field in zip(*parts, strict=True)))
            found = jax.device_get(compute(batch))
            values = {"hidden": found.hidden, "ids": found.top.ids, "log_probs": found.top.log_probs, "last": found.last}
            for name, array in self._arrays.items():
                with np.errstate(over="ignore"):  # said below, in our words
                    array[chosen.start : chosen.stop] = values[name][: len(chosen)].astype(array.dtype)
                if not np.isfinite(array[chosen.start : chosen.stop]).all():
                    raise UserError(
                        f"the target's {name} of rows {chosen.start} to {chosen.stop - 1} has values beyond {array.dtype}; "
                        "expected cache.dtype='float32', or cache.enabled=False"
                    )
            self.rows = chosen.stop
            much = self.rows - last_flushed >= 64 * batch_size or time.monotonic() - flushed_at >= _SECONDS_TO_FLUSH
            if self.complete or much:
                # Rows count as done only when they are on disk.
                for array in self._arrays.values():
                    array.flush()
                files.write_whole(self._folder / "rows_done", str(self.rows))
                last_flushed, flushed_at = self.rows, time.monotonic()
            yield self.rows

    def read(self, rows: np.ndarray, width: int) -> Features:
        """Numpy features of the first `width` positions of those rows."""
        get = {name: array[rows, :width] for name, array in self._arrays.items()}
        if get["ids"].size and not 0 <= get["ids"].min() <= get["ids"].max() < self._vocab_size:
            raise self._damaged(f"ids.npy has ids outside of the vocabulary, 0 to {self._vocab_size - 1}")
        return Features(get["hidden"], get.get("last"), TopTokens(get["ids"], get["log_probs"].astype(np.float32)))


class JoinedCache(NamedTuple):
    """The features of `JoinedRows`. ends: int [P], rows of all parts up to each. parts: the cache of each."""

    ends: np.ndarray
    parts: tuple[FeatureCache, ...]

    @property
    def complete(self) -> bool:
        return all(part.complete for part in self.parts)

    def read(self, rows: np.ndarray, width: int) -> Features:
        """As of a `FeatureCache`."""
        chosen = np.searchsorted(self.ends, rows, side="right")
        starts = np.concatenate([[0], self.ends])
        found = [self.parts[part].read(np.array([row - starts[part]]), width) for part, row in zip(chosen, rows, strict=True)]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)
