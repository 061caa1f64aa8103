"""Operations of `model/ops.py` in forms of plain JAX that XLA compiles to faster programs for a CPU."""

import jax
import jax.numpy as jnp

from eesd_jax.model import ops, rope
from eesd_jax.model.config import ModelConfig

_GROUP = 64  # numbers of which the greatest is found first


def divides_into_groups(x: jax.Array) -> bool:
    """Whether `argmax` takes this: a last axis of whole groups."""
    return x.shape[-1] % _GROUP == 0


def argmax(x: jax.Array) -> jax.Array:
    """`ops.argmax` by groups: XLA's argmax for CPU looks at one number after the other, its maximum at many."""
    groups = x.reshape(*x.shape[:-1], -1, _GROUP)
    group = jnp.argmax(jnp.max(groups, axis=-1), axis=-1)
    chosen = jnp.take_along_axis(groups, group[..., None, None], axis=-2)[..., 0, :]
    return (group * _GROUP + jnp.argmax(chosen, axis=-1)).astype(jnp.int32)


def always(*arguments: object) -> bool:
    """Accepts whatever it is asked."""
    del arguments
    return True


def rotation(config: ModelConfig, x_BxTxD: jax.Array, start_B: jax.Array, offset_T: jax.Array) -> rope.Rotation:
    """`ops.rotation` behind a condition that always holds.

    Sines and cosines are dear on a CPU, and XLA takes them anew for every head of every block, unless it cannot look behind a condition.
    """

    def take() -> rope.Rotation:
        return ops.rotation.plain(config, x_BxTxD, start_B, offset_T)

    nothing = jax.tree.map(lambda of: jnp.zeros(of.shape, of.dtype), jax.eval_shape(take))
    return jax.lax.cond(jnp.any(start_B >= 0), take, lambda: nothing)
