"""What a sampled text depends on: its prompt and seed alone, or also on what was drafted, which may depend on the rows beside it."""

import functools

import pytest
import tiny

from eesd_jax import DecodeConfig, Engine, SamplingConfig
from eesd_jax.config import DraftConfig
from eesd_jax.decode.controllers import Calibration, Controller, parse_controller
from eesd_jax.decode.costs import RoundCosts
from eesd_jax.decode.sources import ngrams
from eesd_jax.engine.drafter import Drafter
from eesd_jax.model.exit_branch import init_exit_branch

PROMPTS = [[5, 9, 5, 9, 5], [7] * 9, [11, 12, 13] * 4, [250, 3, 250]]
ALL = (0, 1, 2, 3)
SEEDS = [7, 8, 9, 7]
SAMPLED = SamplingConfig(temperature=0.4, top_k=40)
OPTIONS = DecodeConfig(max_new_tokens=16, prompt_buckets=(16,), min_capacity=64)
# Cheap drafts, so that some are made, and dear ones, as in a large batch.
CHEAP = RoundCosts((1.0, 1.05, 1.1), (1.0, 1.01, 1.02))
DEAR = RoundCosts((1.0, 1.3, 1.9), (1.0, 1.2, 1.8))
SLOW = pytest.mark.slow


@functools.cache
def make_engine(branch: bool, lookup: bool) -> Engine:
    """What lookup drafts is in part right: a table of what plain decoding writes for half of the prompts."""
    model = tiny.loaded_model(num_hidden_layers=2)._replace(eos_ids=())
    table = ngrams.build([PROMPTS[row] + plain()[row] for row in (0, 2)], 1024) if lookup else None
    drafter = Drafter(
        init_exit_branch(model.config, model.params, 1, "next") if branch else None,
        DraftConfig(1 if branch else 0, max_draft=2, verify_widths=(), longest_match=2 * lookup),  # of one width, which compiles sooner
        Calibration(),
        trained=False,
        ngrams=table,
    )
    return Engine(model, OPTIONS, drafter)


def texts(lm: Engine, rows: tuple[int, ...], controller: Controller | None) -> tuple[list[list[int]], int]:
    """New tokens of these rows together, and how many drafts became text."""
    found = lm.generate_ids([PROMPTS[i] for i in rows], seeds=[SEEDS[i] for i in rows], sampling=SAMPLED, controller=controller)
    return [one.token_ids for one in found], sum(one.accepted for one in found)


@functools.cache
def plain() -> list[list[int]]:
    return texts(Engine(tiny.loaded_model(num_hidden_layers=2)._replace(eos_ids=()), OPTIONS), ALL, None)[0]


def controller_of(lm: Engine, name: str, costs: RoundCosts = CHEAP) -> Controller:
    return lm.drafter.controller(parse_controller(name, 2), costs)


@pytest.mark.parametrize("name", ["fixed:2", pytest.param("cost_aware", marks=SLOW)])
def test_where_only_lookup_drafts_a_text_is_that_of_plain_decoding(name):
    """To the token, whatever is drafted and whoever else is there."""
    lm, kept = make_engine(branch=False, lookup=True), 0
    for rows in ((0,), (2,), ALL, (3, 2, 1, 0), (0, 0, 3, 1)):
        found, accepted = texts(lm, rows, controller_of(lm, name, CHEAP if len(rows) == 1 else DEAR))
        assert found == [plain()[row] for row in rows]
        kept += accepted
    assert kept > 5


@SLOW
@pytest.mark.parametrize(
    ("name", "lookup"), [("fixed:2", False), ("threshold:0.02", False), ("beta", False), ("calibrated", False), ("fixed:2", True)]
)
def test_where_the_branch_drafts_these_controllers_give_a_row_the_same_in_any_company(name, lookup):
    lm = make_engine(branch=True, lookup=lookup)
    controller = controller_of(lm, name)
    alone = [texts(lm, (row,), controller)[0][0] for row in (0, 2)]
    for rows in ((2, 1, 0, 3), (0, 2, 2, 2)):
        found, accepted = texts(lm, rows, controller)
        assert [found[rows.index(row)] for row in (0, 2)] == alone
        assert accepted > 0


@SLOW
def test_what_is_drafted_changes_the_draw_where_the_branch_drafts():
    """Why no more is promised there: the law stays, the draw does not."""
    lm = make_engine(branch=True, lookup=False)
    found = {name: texts(lm, ALL, controller_of(lm, name))[0] for name in ("fixed:1", "fixed:2")}
    assert found["fixed:1"] != plain()
    assert found["fixed:1"] != found["fixed:2"]


@SLOW
@pytest.mark.parametrize("lookup", [False, True])
def test_a_round_without_drafts_draws_what_plain_decoding_draws(lookup):
    lm = make_engine(branch=True, lookup=lookup)
    assert texts(lm, ALL, controller_of(lm, "fixed:0"))[0] == plain()


@SLOW
def test_cost_aware_reproduces_with_the_same_costs_and_rows():
    lm = make_engine(branch=True, lookup=True)
    assert texts(lm, ALL, controller_of(lm, "cost_aware")) == texts(lm, ALL, controller_of(lm, "cost_aware"))
