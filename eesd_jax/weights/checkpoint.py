"""Checkpoints of a training run (orbax): written in the background, whole or not at all, each saying which experiment it is of."""

import json
import os
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from eesd_jax.errors import UserError


class Checkpoints:
    """A folder of the last few checkpoints, local or in a bucket; a context that waits for what is being written.

    Args:
      folder: made if need be.
      keep: how many stay.
      identity: what makes the experiment what it is, JSON; by name.

    Raises:
      UserError: from `restore`, where the last checkpoint is of another experiment, or damaged.
    """

    def __init__(self, folder: epath.Path, keep: int, identity: dict[str, Any]):
        self._folder, self._identity = folder, json.loads(json.dumps(identity))
        folder.mkdir(parents=True, exist_ok=True)
        self._checkpointer = ocp.training.Checkpointer(
            folder if "://" in os.fspath(folder) else os.path.abspath(folder),  # orbax takes no others
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,  # of a run that was killed while it wrote
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: Any) -> None:
        self._checkpointer.close()

    @property
    def latest(self) -> int:
        """The last complete step, 0 where there is none."""
        found = self._checkpointer.latest
        return found.step if found else 0

    def restore(self, initial: Any) -> tuple[Any, Any]:
        """The last state, placed as the arrays of `initial` are, and what was saved beside it; `initial` and None where there is none."""
        if not self.latest:
            return initial, None
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), initial)
        try:
            about = self._checkpointer.metadata().custom_metadata
            refuse_other(about["identity"], self._identity, os.fspath(self._folder.parent))
            return self._checkpointer.load(abstract_state=abstract), about["beside"]
        except UserError:
            raise
        except Exception as error:  # whatever orbax and its parsers raise
            reason = " ".join(str(error).split())[:120]  # orbax says everything that it knows
            raise UserError(
                f"checkpoint {os.fspath(self._folder / str(self.latest))!r} cannot be read ({type(error).__name__}: {reason} ...); "
                "expected a whole one: without that folder, training goes on from the one before"
            ) from None

    def save(self, done: int, state: Any, beside: Any) -> None:
        """Begins to write the state behind step `done`, and JSON beside it, unless that step is there already."""
        if done > self.latest:
            # A copy, because the next step is given the state's own buffers to write to.
            copy = jax.tree.map(jnp.copy, state)
            self._checkpointer.save_async(done, copy, force=True, custom_metadata={"identity": self._identity, "beside": beside})

    def wait(self) -> None:
        """Until nothing is being written."""
        self._checkpointer.wait()


def refuse_other(found: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    """Raises UserError where two experiments differ, and names the fields with both values."""
    wanted = json.loads(json.dumps(wanted))
    names = [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
    if names:
        listed = "; ".join(f"{name} was {found.get(name)!r} and is now {wanted.get(name)!r}" for name in names[:6])
        raise UserError(f"{where} holds another experiment: {listed}; expected the same config, or another output_dir")
