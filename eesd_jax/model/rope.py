"""Rotary position embedding (Su et al. 2021), half-split as in Llama, with the length extensions `linear`, `llama3` and `yarn`.

Angles are computed for the positions at hand in float32, so there is no table to size, shard or gather from.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eesd_jax.model.config import RopeConfig


class Rotation(NamedTuple):
    """Rotation of one pass's tokens, shared by all blocks.

    cos, sin: float32 [B, T, H/2].
    """

    cos: jax.Array
    sin: jax.Array


def inverse_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position for each pair of channels, float64 [H/2], extension applied.

    Sources: `linear` Chen et al. 2023; `yarn` Peng et al. 2023, section 3.2 ("NTK-by-parts"); `llama3` the Llama 3.1 release.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies = config.theta**-exponents
    if config.kind == "linear":
        return frequencies / config.factor
    if config.kind == "divisors":
        return frequencies / np.asarray(config.divisors)
    if config.kind == "llama3":
        wavelengths = 2 * np.pi / frequencies
        low, high = config.low_freq_factor, config.high_freq_factor
        # 0 where the wavelength is longer than the original context / low (fully interpolated), 1 where shorter than / high.
        keep = np.clip((config.original_context / wavelengths - low) / (high - low), 0.0, 1.0)
        return (1 - keep) * frequencies / config.factor + keep * frequencies
    if config.kind == "yarn":
        keep = 1 - _yarn_ramp(config, head_dim)
        return (1 - keep) * frequencies / config.factor + keep * frequencies
    return frequencies


def _yarn_ramp(config: RopeConfig, head_dim: int) -> np.ndarray:
    """0 for channel pairs that turn more than beta_fast times within the original context, 1 for fewer than beta_slow, linear between."""

    def pair_turning(turns: float) -> float:
        return head_dim * math.log(config.original_context / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair_turning(config.beta_fast), pair_turning(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = max(high - low, 1e-3)  # both ends may fall on one pair
    return np.clip((np.arange(head_dim // 2, dtype=np.float64) - low) / width, 0.0, 1.0)


def rotation(config: RopeConfig, head_dim: int, positions_BxT: jax.Array) -> Rotation:
    """Cosines and sines for integer positions [B, T], scaled by the extension's attention factor."""
    frequencies = jnp.asarray(inverse_frequencies(config, head_dim), jnp.float32)
    angles_BxTxH2 = positions_BxT[..., None].astype(jnp.float32) * frequencies
    return Rotation(jnp.cos(angles_BxTxH2) * config.attention_factor, jnp.sin(angles_BxTxH2) * config.attention_factor)


def rotate(x_BxTxNxH: jax.Array, rot: Rotation) -> jax.Array:
    """Rotates heads [B, T, N, H] by the angles of their positions; computed in float32, returned in x's dtype."""
    first, second = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    cos, sin = rot.cos[:, :, None, :], rot.sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BxTxNxH.dtype)
