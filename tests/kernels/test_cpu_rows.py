"""The CPU kernel for a few rows: right values, the same bits whatever the number of rows, differentiable, and used where it can be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from eesd_jax.kernels.cpu import rows as cpu_rows
from eesd_jax.model import ops

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="a kernel for CPUs")


def multiply(x: jax.Array, weight: jax.Array) -> jax.Array:
    # A function of its own, so that nothing traced with other registers is used.
    return jax.jit(lambda x, weight: cpu_rows.rows_by_matrix(x, weight))(x, weight)


def operands(rows: int, inputs: int, outputs: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(rows)
    return jnp.asarray(rng.normal(size=(rows, inputs)), jnp.float32), jnp.asarray(rng.normal(size=(outputs, inputs)), jnp.float32)


@pytest.mark.parametrize(("inputs", "outputs"), [(16, 4), (48, 12), (576, 192), (64, 1000), (1536, 576)])
def test_gives_the_product(registers, inputs, outputs):
    x, weight = operands(7, inputs, outputs)
    assert cpu_rows.usable(7, weight)
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(multiply(x, weight), exact, rtol=1e-5, atol=1e-5 * inputs**0.5)


def test_every_number_of_rows_gives_the_same_bits(registers):
    x, weight = operands(cpu_rows.MAX_ROWS, 192, 320)
    whole = np.asarray(multiply(x, weight))
    for rows in range(1, cpu_rows.MAX_ROWS):
        np.testing.assert_array_equal(multiply(x[:rows], weight), whole[:rows])


def test_many_products_at_once_agree():
    # Products without order between them may run at the same time, and share the thread pool.
    x, weight = operands(5, 64, 256)

    found = jax.jit(lambda scale: [cpu_rows.rows_by_matrix(x * scale * 2.0**i, weight) for i in range(8)])(1.0)
    for i, product in enumerate(found):
        np.testing.assert_array_equal(product, np.asarray(found[0]) * 2.0**i)


def test_gradients_are_those_of_the_product():
    x, weight = operands(3, 32, 16)
    ours = jax.grad(lambda x, w: jnp.sum(jnp.sin(cpu_rows.rows_by_matrix(x, w))), (0, 1))(x, weight)
    exact = jax.grad(lambda x, w: jnp.sum(jnp.sin(jnp.dot(x, w.T, precision="highest"))), (0, 1))(x, weight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, exact)


def test_other_sizes_and_dtypes_are_left_to_xla():
    _, weight = operands(1, 64, 64)
    assert not cpu_rows.usable(cpu_rows.MAX_ROWS + 1, weight)
    assert not cpu_rows.usable(1, weight.astype(jnp.bfloat16))
    assert not cpu_rows.usable(1, weight[:62])
    assert not cpu_rows.usable(1, weight[:, :60])


def test_decoding_passes_use_it():
    config = tiny.config()
    weight = tiny.params(config)["blocks"][0]["wq"]

    def program() -> str:
        return jax.jit(ops.linear).lower(jnp.ones((1, 2, config.hidden_size)), weight).as_text()

    assert cpu_rows.TARGET in program()
    with ops.kernels_for(ops.PLAIN):
        assert cpu_rows.TARGET not in program()


def test_several_weights_at_once_give_what_each_gives(registers):
    for rows in (1, 3, 9, 37):
        x, first = operands(rows, 96, 40)
        weights = [first, first[:4] + 1, first[4:24] * 2]
        together = jax.jit(lambda x, *weights: cpu_rows.rows_by_matrix(x, *weights))(x, *weights)
        np.testing.assert_array_equal(together, jnp.concatenate([multiply(x, weight) for weight in weights], axis=-1))

    def gradients(product):
        return jax.grad(lambda x, *weights: jnp.sum(jnp.sin(product(x, *weights))), (0, 1, 3))(x, *weights)

    ours = gradients(cpu_rows.rows_by_matrix)
    apart = gradients(lambda x, *weights: jnp.concatenate([x @ weight.T for weight in weights], axis=-1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, apart)
