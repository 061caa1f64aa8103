"""Measures the best rates of a machine's memory and arithmetic, which other times are compared with."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from eesd_jax.model import ops

REPEATS = 5


def median_seconds(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Times the work `repeats` times, after one call that compiles; returns the median."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(work())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def copy_bandwidth() -> float:
    """Measures the bytes a second, read and written, of changing an array of 1 GiB (64 MiB on a CPU)."""
    block = jnp.zeros(2**24 if jax.default_backend() == "cpu" else 2**28, jnp.float32)
    change = jax.jit(lambda x: x + 1)
    return 2 * block.nbytes / median_seconds(lambda: change(block))


def matrix_rate(dtype: jnp.dtype) -> float:
    """Measures the floating-point operations a second of a product of large matrices."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    matrix = jnp.ones((size, size), dtype)
    multiply = jax.jit(lambda x: x @ x)
    return 2 * size**3 / median_seconds(lambda: multiply(matrix))


def read_bandwidth(outputs: int = 2**16) -> float:
    """Measures the bytes a second of reading a matrix of 16 KiB an output (1 GiB) once, to multiply one row by it."""
    inputs = 4096
    matrix, row = jnp.ones((outputs, inputs), jnp.float32), jnp.ones((1, 1, inputs), jnp.float32)
    multiply = jax.jit(ops.linear)
    return matrix.nbytes / median_seconds(lambda: multiply(row, matrix))
