"""A controller from outside the package: that of docs/controllers.md, by its name and as an instance, with every source of drafts."""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from eesd_jax import Controller, DecodeConfig, Engine, UserError
from eesd_jax.config import DraftConfig
from eesd_jax.decode.controllers import Calibration, Posterior, parse_controller
from eesd_jax.decode.costs import RoundCosts
from eesd_jax.engine import engine as programs
from eesd_jax.engine import timing
from eesd_jax.engine.drafter import Drafter
from eesd_jax.model.exit_branch import init_exit_branch

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "controllers.md"
(BLOCK,) = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
PROMPTS = [[5, 9, 200, 31, 5, 9, 200], [7, 7]]
SOURCES = {"exit": (True, 0, 1), "exit and lookup": (True, 2, 1), "two candidates": (True, 2, 2)}


@pytest.fixture
def name(tmp_path: pathlib.Path) -> str:
    (tmp_path / "halving.py").write_text(BLOCK)
    return f"{tmp_path / 'halving.py'}:Halving"


@functools.cache
def engine(has_branch: bool, longest_match: int, candidates: int) -> Engine:
    model = tiny.loaded_model()._replace(eos_ids=())
    branch = init_exit_branch(model.config, model.params, 2, "last") if has_branch else None
    draft = DraftConfig(2 if has_branch else 0, 3, (2,), longest_match=longest_match, candidates=candidates)
    options = DecodeConfig(max_new_tokens=16, prompt_buckets=(16,), min_capacity=32)
    return Engine(model, options, Drafter(branch, draft, Calibration(), trained=False))


@pytest.fixture(autouse=True)
def costs(monkeypatch: pytest.MonkeyPatch):
    cost = (1.0, 1.01, 1.02, 1.03)
    monkeypatch.setattr(timing, "round_costs", lambda engine, batch: RoundCosts(exit=cost, look_up=(1.0, 9.0, 9.0, 9.0)))


def texts(lm: Engine, controller: Controller | str | None) -> tuple[list[list[int]], list[int]]:
    """Token ids of each row, and the drafts of the branch in each of the first row's rounds."""
    found = lm.generate_ids(PROMPTS, seeds=[0, 0], controller=controller)
    log = found[0].log
    return [one.token_ids for one in found], log.drafted[~log.looked_up].tolist()


@functools.cache
def plain() -> list[list[int]]:
    return texts(engine(*SOURCES["exit"]), None)[0]


@pytest.mark.parametrize("sources", ["exit", "exit and lookup", pytest.param("two candidates", marks=pytest.mark.slow)])
def test_the_documents_controller_drafts_with_every_source(name: str, sources: str):
    lm = engine(*SOURCES[sources])
    text, drafted = texts(lm, name)
    assert text == plain()
    # A branch that is the target: everything is accepted, so each round drafts one more, up to what there is room for.
    assert drafted[:3] == [2, 3, 3]
    compiled = programs._decode_speculative._cache_size()
    own = parse_controller(name, 3).controller
    for first, expected in ((1.0, [1, 2, 3]), (2.0, [2, 3, 3]), (2.0, [2, 3, 3])):
        text, drafted = texts(lm, own(first=first))
        assert (text, drafted[:3]) == (plain(), expected)
    assert programs._decode_speculative._cache_size() == compiled  # another instance, and other numbers, compile nothing


def test_without_a_branch_it_is_refused(name: str):
    with pytest.raises(UserError, match="needs an exit branch, and only lookup drafts"):
        engine(False, 2, 1).controller(name)


class Greedy(Controller):
    """Takes all that lookup finds; no dataclass, and no branch."""

    needs_branch = False
    chooses_source = True

    def look_up(self, plan, offer):
        return offer.found.count

    def keep_drafting(self, keys_B, plan, k, confidence_B):
        return jnp.zeros(confidence_B.shape, bool), plan


def test_a_controller_that_chooses_sources_takes_the_place_of_the_bandit():
    lm = engine(False, 2, 1)
    found = lm.generate_ids(PROMPTS, seeds=[0, 0], controller=Greedy())
    assert [one.token_ids for one in found] == plain()
    assert sum(one.accepted for one in found) > 0
    assert all(one.log.looked_up[one.log.drafted > 0].all() for one in found)


def test_a_plain_class_is_compiled_once_for_equal_settings():
    assert Greedy() == Greedy()
    assert hash(Greedy()) == hash(Greedy())
    assert jax.tree.leaves(Greedy()) == []


@dataclasses.dataclass(frozen=True)
class Mixed(Controller):
    length: int = 2
    rate: float = 0.5
    flag: bool = True
    label: str = "a"
    size: int = dataclasses.field(default=3, metadata={"static": True})


def test_numbers_are_arguments_and_the_rest_is_compiled_in():
    assert jax.tree.leaves(Mixed()) == [2, 0.5]
    assert jax.tree.structure(Mixed(4, 0.1)) == jax.tree.structure(Mixed())
    for other in (Mixed(flag=False), Mixed(label="b"), Mixed(size=4)):
        assert jax.tree.structure(other) != jax.tree.structure(Mixed())


@dataclasses.dataclass(frozen=True)
class Believing(Controller):
    """Its belief has whatever type its arithmetic gives."""

    def init(self, batch):
        return jnp.ones(batch, int)

    def keep_drafting(self, keys_B, plan, k, confidence_B):
        return k < 1, plan

    def update(self, state, plan, outcome):
        return state + outcome.accepted * 1.0

    def posterior(self, state):
        return Posterior(alpha=state, beta=state * 0 + 2)


def test_what_it_believes_is_in_the_log():
    (found,) = engine(*SOURCES["exit"]).generate_ids(PROMPTS[:1], seeds=[0], controller=Believing())
    rounds = len(found.log.drafted)
    np.testing.assert_array_equal(found.log.alpha, 1 + np.cumsum([0, *found.log.accepted[:-1]]))
    np.testing.assert_array_equal(found.log.beta, [2] * rounds)


@pytest.mark.parametrize(
    ("content", "asked", "expected"),
    [
        (None, "nowhere.py:Mine", "cannot read 'nowhere.py'"),
        ("x = 1 +", "own.py:Mine", "cannot be imported (SyntaxError"),
        ("import no_such_module", "own.py:Mine", "cannot be imported (ModuleNotFoundError"),
        ("class Other: pass", "own.py:Mine", "derived from eesd_jax.Controller"),
        ("class Mine: pass", "own.py:Mine", "derived from eesd_jax.Controller"),
        ("import eesd_jax\nclass Mine(eesd_jax.Controller): pass", "own.py:Mine:3", "'own.py:Mine:3' is unknown"),
        (
            "import eesd_jax\nclass Mine(eesd_jax.Controller):\n  def __init__(self, length): pass",
            "own.py:Mine",
            "expected defaults for all settings",
        ),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(tmp_path, monkeypatch, content, asked, expected):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        pathlib.Path("own.py").write_text(content)
    with pytest.raises(UserError) as error:
        engine(*SOURCES["exit"]).controller(asked)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("controller", [{"first": 1}, object(), 3])
def test_what_is_no_controller_is_refused_in_words(controller):
    with pytest.raises(UserError, match=r"expected an instance of a class derived from eesd_jax\.Controller"):
        engine(*SOURCES["exit"]).generate_ids(PROMPTS, seeds=[0, 0], controller=controller)


def test_a_registered_class_has_a_name():
    """Names come from the classes themselves: registering one is all that a new one needs."""
    from eesd_jax.decode.controllers import known_names, protocol

    protocol.register("mixed:N")(Mixed)
    try:
        assert "mixed:N" in known_names()
        assert parse_controller("mixed", 3).controller is Mixed
    finally:
        del protocol.REGISTRY["mixed"]
        protocol.USAGES.remove("mixed:N")
