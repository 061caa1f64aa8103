"""Decoding on a mesh of virtual devices: the tokens of one device, caches where their heads are, and no more talk than it takes."""

import collections
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from eesd_jax import DecodeConfig, Engine, SamplingConfig, UserError
from eesd_jax.config import LONGEST_MATCH, DraftConfig
from eesd_jax.decode.controllers import Calibration, Controller, Fixed, Setup, build_controller, parse_controller
from eesd_jax.decode.costs import RoundCosts
from eesd_jax.decode.sources import ngrams
from eesd_jax.engine import engine as programs
from eesd_jax.engine.drafter import Drafter
from eesd_jax.model import exit_branch
from eesd_jax.model.sharding import make_mesh
from eesd_jax.weights.load import LoadedModel, load_params

OPTIONS = DecodeConfig(max_new_tokens=20, prompt_buckets=(16,), min_capacity=64)
SLOW = pytest.mark.slow
PROMPTS = [[5, 9, 200, 5, 9, 200, 5], [7]]


def make_engine(
    axes: dict[str, int],
    blocks: int = 3,
    longest_match: int = 0,
    kv_heads: int = 4,
    table: np.ndarray | None = None,
    candidates: int = 1,
) -> Engine:
    """A model with four heads over four or fewer, and a branch behind its first block that is right now and then.

    Args:
      axes: of the mesh, if there are some. table: of n-grams, if it has one.
    """
    mesh = make_mesh(**axes) if axes else None
    config = tiny.config(num_hidden_layers=blocks, num_key_value_heads=kv_heads)
    source = tiny.ArraySource(tiny.tensors(config))
    branch = exit_branch.init_exit_branch(config, load_params(config, source, jnp.dtype("float32")), 1, "zero")
    if mesh:
        homes = exit_branch.exit_branch_shardings(config, config.vocab_size, mesh)
        branch = jax.tree.map(jax.device_put, branch, homes)
    model = LoadedModel(config, load_params(config, source, jnp.dtype("float32"), mesh), tiny.loaded_model().tokenizer, ())
    draft = DraftConfig(1, 2, verify_widths=(), longest_match=longest_match, candidates=candidates)
    return Engine(model, OPTIONS, Drafter(branch, draft, Calibration(), trained=False, ngrams=table))


@pytest.mark.parametrize(
    "axes", [{"data": 2, "tensor": 2}, pytest.param({"tensor": 4}, marks=SLOW), pytest.param({"fsdp": 2, "tensor": 2}, marks=SLOW)], ids=str
)
def test_tokens_are_those_of_one_device(axes):
    costs = RoundCosts(exit=(1.0, 1.0, 1.0), look_up=(1.0, 1.0, 1.0))
    one = make_engine({})
    expected = [generation.token_ids for generation in one.generate_ids(PROMPTS, seeds=[0, 1], controller=None)]
    # Counted in the very answers, so that lookup has something to go on with.
    table = ngrams.build([prompt + answer for prompt, answer in zip(PROMPTS, expected, strict=True)], 2**12)
    many = make_engine(axes, longest_match=LONGEST_MATCH, table=table)
    both = build_controller(parse_controller("cost_aware", 2), Setup(calibration=Calibration(), costs=costs, has_lookup=True))
    for controller in (None, both):
        found = many.generate_ids(PROMPTS, seeds=[0, 1], controller=controller)
        assert [generation.token_ids for generation in found] == expected
    assert sum(int(generation.log.drafted.sum()) for generation in found) > 0


@SLOW
def test_several_candidates_on_a_mesh():
    logs = []
    for axes in ({}, {"data": 2, "tensor": 2}):
        found = make_engine(axes, candidates=3).generate_ids(PROMPTS, seeds=[0, 1], controller=Fixed(2))
        logs.append([(generation.token_ids, generation.log.committed.tolist()) for generation in found])
    assert logs[0] == logs[1]
    plain = make_engine({}).generate_ids(PROMPTS, seeds=[0, 1], controller=None)
    assert [tokens for tokens, _ in logs[0]] == [generation.token_ids for generation in plain]


@SLOW
@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 2}, {"fsdp": 2, "tensor": 4}], ids=str)
def test_a_table_of_ngrams_drafts_on_a_mesh_what_it_drafts_on_one_device(axes):
    """Every device has all of it; the drafts come from it alone, and nearly all are right, as it was counted in the very answers."""
    plain = make_engine({}).generate_ids(PROMPTS, seeds=[0, 1], controller=None)
    expected = [generation.token_ids for generation in plain]
    table = ngrams.build([prompt + answer for prompt, answer in zip(PROMPTS, expected, strict=True)], 2**12)
    costs = RoundCosts(exit=(1.0, 9.0, 9.0), look_up=(1.0, 1.0, 1.0))  # so that it does not pay to ask the branch
    logs = []
    for where in ({}, axes):
        engine = make_engine(where, longest_match=LONGEST_MATCH, table=table)
        both = build_controller(parse_controller("cost_aware", 2), Setup(calibration=Calibration(), costs=costs, has_lookup=True))
        found = engine.generate_ids(PROMPTS, seeds=[0, 1], controller=both)
        assert [generation.token_ids for generation in found] == expected
        logs.append([(generation.drafted, generation.accepted) for generation in found])
    assert engine.ngrams.sharding.is_fully_replicated
    assert len(engine.ngrams.sharding.device_set) == math.prod(axes.values())
    assert logs[0] == logs[1]
    assert sum(accepted for _, accepted in logs[1]) >= 20


def lower(engine: Engine, controller: Controller | None, state: object) -> jax.stages.Lowered:
    """The loop that decodes, lowered."""
    settings = programs._sampling_arrays(SamplingConfig(), 2, engine.rows_home)
    if controller is None:
        return programs._decode_plain.lower(engine.model.config, jnp.zeros(1, jnp.int32), engine.params, settings, state, jnp.int32(4))
    return programs._decode_speculative.lower(engine.speculation(controller, settings), state, jnp.int32(4))


def decode_program(engine: Engine, controller: Controller | None) -> tuple[str, object]:
    """The HLO of the loop that decodes, and the state that it is given."""
    state = engine.prefill(PROMPTS, [0, 1], 2, 20, controller)
    return lower(engine, controller, state).compile().as_text(), state


@pytest.mark.parametrize("controller", [None, Fixed(2)], ids=["plain", "EESD"])
def test_weights_that_are_split_are_left_to_the_compiler(controller):
    """No kernel is called, though nobody says that there is a mesh, and of the state nothing tells it."""
    alone = make_engine({})
    state = alone.prefill(PROMPTS, [0, 1], 2, 20, controller)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    engines = {"one device": alone, "four": make_engine({"tensor": 4})}
    called = {name: "eesd_jax_" in lower(engine, controller, shapes).as_text() for name, engine in engines.items()}
    assert called == {"one device": jax.default_backend() == "cpu", "four": False}


def collectives(text: str) -> collections.Counter[str]:
    """How many there are of each kind."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    return collections.Counter(re.findall(rf"= [^=]* ({kinds})(?:-start)?\(", text))


@pytest.mark.parametrize("controller", [None, pytest.param(Fixed(2), marks=SLOW)], ids=["plain", "EESD"])
def test_a_block_adds_up_twice_and_says_nothing_else(controller):
    """Once behind its attention and once behind its MLP, however many passes (late blocks are compiled for one width here)."""
    axes = {"tensor": 4}
    few, more = (collectives(decode_program(make_engine(axes, blocks), controller)[0]) for blocks in (2, 4))
    assert few["all-reduce"] >= 2 * 2
    assert more - few == {"all-reduce": 2 * 2}


@SLOW
def test_rows_of_other_devices_are_none_of_a_blocks_business():
    few, more = (collectives(decode_program(make_engine({"data": 2}, blocks), Fixed(2))[0]) for blocks in (2, 4))
    assert more == few


@pytest.mark.parametrize("axes", [pytest.param({"tensor": 4}, marks=SLOW), {"data": 2, "tensor": 2}], ids=str)
def test_caches_lie_where_their_heads_and_rows_are(axes):
    text, state = decode_program(make_engine(axes), Fixed(2))
    caches = [*state.cache.k, *state.cache.v, *state.draft.exit_cache.k, *state.draft.exit_cache.v]
    for cache in caches:
        rows, heads, *_ = cache.sharding.shard_shape(cache.shape)
        assert (rows, heads) == (2 // axes.get("data", 1), 4 // axes["tensor"])
    # And they are never gathered, nor is what is written to them: nothing else has four axes.
    gathers = [line for line in text.splitlines() if " all-gather(" in line]
    assert gathers
    for line in gathers:
        assert len(re.search(r"\[([\d,]*)\]", line)[1].split(",")) < 4, line


@SLOW
@pytest.mark.parametrize("axes", [{"tensor": 4}, {"fsdp": 2, "tensor": 4}], ids=str)
def test_heads_that_no_axis_divides(axes):
    """Two key/value heads over four devices: half of a head's channels each, or a copy; the tokens are those of one device."""
    expected = [generation.token_ids for generation in make_engine({}, kv_heads=2).generate_ids(PROMPTS, seeds=[0, 1], controller=None)]
    many = make_engine(axes, kv_heads=2)
    for controller in (None, Fixed(2)):
        found = many.generate_ids(PROMPTS, seeds=[0, 1], controller=controller)
        assert [generation.token_ids for generation in found] == expected
    for cache in many.prefill(PROMPTS, [0, 1], 2, 20, Fixed(2)).cache.k:
        rows, heads, *_ = cache.sharding.shard_shape(cache.shape)
        assert (rows, heads) in ((2, 2), (2, 1))


def test_rows_that_do_not_spread_evenly():
    engine = make_engine({"data": 2})
    with pytest.raises(UserError, match=r"batch of 3 rows .* 2; expected a multiple"):
        engine.prefill([[5]] * 3, [0] * 3, 3, 4)
    # Generation adds empty rows.
    assert len(engine.generate_ids([[5]] * 3, seeds=[0] * 3, controller=None)) == 3
