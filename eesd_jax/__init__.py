"""Early-exiting speculative decoding with Thompson-sampling control, in JAX."""

from eesd_jax.config import DecodeConfig, ModelConfig, SamplingConfig
from eesd_jax.engine import Engine, Generation, load
from eesd_jax.errors import UserError

__all__ = ["DecodeConfig", "Engine", "Generation", "ModelConfig", "SamplingConfig", "UserError", "load"]
