"""CPU kernels that multiply by a file's codes as integers: as exact as float32, and the same bits whatever the number of rows."""

import coded
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eesd_jax.kernels.cpu import codes as cpu_codes
from eesd_jax.kernels.cpu import dots, integers, tiles
from eesd_jax.kernels.cpu import rows as cpu_rows
from eesd_jax.kernels.cpu.integers import Integers
from eesd_jax.model import ops
from eesd_jax.model.stored import Codes

KERNELS = [module for module in (tiles, dots) if jax.default_backend() == "cpu" and module.available()]
pytestmark = pytest.mark.skipif(not KERNELS, reason="for processors that multiply integers")

KINDS = ("nibbles", "bytes")
SHAPES = ((32, 16), (96, 48), (288, 32), (576, 192))  # inputs, outputs


def as_integers(codes: Codes) -> Integers:
    weight = integers.from_codes(codes)
    assert isinstance(weight, Integers)
    return weight


def multiply(x: np.ndarray, weight: Integers) -> np.ndarray:
    """With whatever this processor has; all of it gives the same bits."""
    products = []
    for kernel in KERNELS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(integers, "kernel", lambda kernel=kernel: kernel)
            products.append(np.asarray(jax.jit(lambda *given: integers.rows_by_integers(*given))(jnp.asarray(x, jnp.float32), weight)))
    for product in products[1:]:
        np.testing.assert_array_equal(product, products[0])
    return products[0]


def activations(rows: int, inputs: int) -> np.ndarray:
    """With some far larger than the others, as in language models."""
    rng = np.random.default_rng(rows)
    return (rng.normal(size=(rows, inputs)) * np.exp(2 * rng.normal(size=(rows, inputs)))).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_is_as_exact_as_the_largest_input_of_a_group_allows(kind, inputs, outputs):
    codes, matrix = coded.weight_of(kind, outputs, inputs)
    x = activations(5, inputs)
    x64, matrix64 = np.asarray(x, np.float64), np.asarray(matrix, np.float64)
    largest = np.repeat(np.abs(x64).reshape(5, -1, cpu_codes.GROUP).max(axis=2), cpu_codes.GROUP, axis=1)
    size = largest @ np.abs(matrix64).T
    assert np.abs(multiply(x, as_integers(codes)) - x64 @ matrix64.T).max() > 0
    np.testing.assert_array_less(np.abs(multiply(x, as_integers(codes)) - x64 @ matrix64.T), 2.0**-22 * size)


@pytest.mark.parametrize("kind", KINDS)
def test_integers_are_multiplied_exactly(kind):
    codes, _ = coded.weight_of(kind, 32, 96)
    ones = jnp.ones_like(codes.scale)
    codes = codes._replace(scale=ones, offset=None if codes.offset is None else -8 * ones)
    x = np.random.default_rng(0).integers(-50, 50, (7, 96))
    matrix = np.asarray(cpu_codes.rows_by_codes(jnp.eye(96), codes)).T.astype(int)
    np.testing.assert_array_equal(multiply(x, as_integers(codes)), x @ matrix.T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_a_rows_bits_do_not_depend_on_the_others(kind, inputs, outputs):
    weight = as_integers(coded.weight_of(kind, outputs, inputs)[0])
    x = activations(37, inputs)
    alone = np.concatenate([multiply(x[i : i + 1], weight) for i in range(37)])
    for rows in (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 16, 17, 33, 37):
        np.testing.assert_array_equal(multiply(x[:rows], weight), alone[:rows])


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_every_size(kind):
    codes, matrix = coded.weight_of(kind, 16, 64)
    weight, x = as_integers(codes), activations(3, 64)
    np.testing.assert_array_equal(multiply(0 * x, weight), np.zeros((3, 16)))
    for power in (-60, 40, 90):
        np.testing.assert_array_equal(multiply(x * 2.0**power, weight), multiply(x, weight) * np.float32(2.0**power))
    assert np.all(np.abs(multiply(x * 2.0**-140, weight)) < 1e-30)
    # The largest that a digit of 23 bits holds, and all around it.
    edge = np.full((1, 64), 2.0 - 2.0**-6, np.float32) + np.arange(-32, 32) * np.float32(2.0**-23)
    exact = np.asarray(edge, np.float64) @ np.asarray(matrix, np.float64).T
    np.testing.assert_allclose(multiply(edge, weight), exact, rtol=0, atol=2.0**-21 * np.abs(matrix).sum(axis=1).max())


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_stays_in_its_row(bad):
    weight, x = as_integers(coded.weight_of("nibbles", 16, 64)[0]), activations(3, 64)
    clean = multiply(x, weight)
    x[1, 40] = bad
    found = multiply(x, weight)
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_groups_are_halves_where_that_loses_nothing(kind):
    codes, _ = coded.weight_of(kind, 16, 64)
    rounded = Codes(
        *(part if part is None or part.dtype != jnp.float32 else part.astype(jnp.float16).astype(jnp.float32) for part in codes)
    )
    whole, halved = as_integers(rounded._replace(scale=codes.scale)), as_integers(rounded)
    assert (whole.scale.dtype, halved.scale.dtype) == (jnp.float32, jnp.float16)
    x = activations(3, 64)
    same = halved._replace(scale=halved.scale.astype(jnp.float32))
    np.testing.assert_array_equal(multiply(x, halved), multiply(x, same))
    if kind == "nibbles":
        assert halved.offset.dtype == jnp.float16
        apart = halved._replace(offset=halved.offset.astype(jnp.float32))
        np.testing.assert_array_equal(multiply(x, halved), multiply(x, apart))


def test_other_codes_stay_as_they_are(monkeypatch):
    narrow, _ = coded.weight_of("bytes", 24, 64)
    assert integers.from_codes(narrow) is narrow
    monkeypatch.setattr(integers, "kernel", lambda: None)
    codes, _ = coded.weight_of("bytes", 16, 64)
    assert integers.from_codes(codes) is codes


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """A model of a file of codes, reading integers, and reading the float32 weights."""
    return coded.engines(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("controller", [None, "fixed:3"])
def test_texts_are_the_same(engines, controller):
    coded.check_texts_are_the_same(*engines, controller)


def test_programs_read_integers_alone(engines):
    for rows in (2, cpu_rows.MAX_ROWS + 1):
        program = coded.program(engines[0], rows)
        # Queries, keys and values of a block are one product; so are gate and up.
        assert program.count(f"call @{integers.kernel().TARGET}") == 3 * 4 + 1
        assert cpu_rows.TARGET not in program and cpu_codes.TARGET not in program
    with ops.kernels_for(ops.PLAIN):
        assert integers.kernel().TARGET not in coded.program(engines[0], 2)
