"""`benchmarks/round_overhead.py` measures what it says: rounds of the forced lengths, and parts that do what a round does."""

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from eesd_jax import DecodeConfig, Engine, SamplingConfig
from eesd_jax.config import DraftConfig
from eesd_jax.decode.controllers import Beta, Calibration, Fixed, Outcome
from eesd_jax.engine.drafter import Drafter
from eesd_jax.model import stored
from eesd_jax.model.exit_branch import init_exit_branch

BETA = Beta(prior_alpha=1.0, prior_beta=1.0, discount=0.9, idle_discount=1.0)
PROMPTS = [[5, 9, 200, 31], [7]]


@pytest.fixture(scope="module")
def overhead():
    with commands.loaded("benchmarks/round_overhead.py") as module:
        yield module


@pytest.fixture(scope="module")
def lm() -> Engine:
    model = tiny.loaded_model(num_hidden_layers=2)._replace(eos_ids=())
    branch = init_exit_branch(model.config, model.params, 1, "zero")
    return Engine(model, DecodeConfig(max_new_tokens=20), Drafter(branch, DraftConfig(1, 2, ()), Calibration(), trained=False))


def test_every_round_is_measured_with_its_parts(overhead, lm):
    samples = overhead.measure(lm, ["forced", "beta"], batch=2, steps=2, repeats=1)
    assert set(samples) == {(name, drafts) for name in ("forced", "beta") for drafts in range(3)}
    assert all(0 < seconds < 10 for (sample,) in samples.values() for seconds in sample)


def test_a_round_is_compared_with_its_parts(overhead):
    none = overhead.Sample(round=12e-3, bare=11e-3, early=1e-3, exit=2e-3, verify=10e-3, decisions=1e-3)
    two = [overhead.Sample(seconds, bare=27e-3, early=1e-3, exit=2e-3, verify=20e-3, decisions=3e-3) for seconds in (31e-3, 90e-3, 33e-3)]
    rows = overhead.result_rows({("beta", 0): [none], ("beta", 2): two})
    assert [(row["controller"], row["drafts"]) for row in rows] == [("beta", 0), ("beta", 2)]
    assert [row["parts"] for row in rows] == pytest.approx([12.0, 30.0])
    assert [row["ratio_to_parts"] for row in rows] == pytest.approx([1.0, 1.1])
    assert [row["ratio_to_bare"] for row in rows] == pytest.approx([1.0, 1.1])


def test_parts_are_held_against_memory(overhead, lm):
    """All weights of the model are read once by a step without drafts, whatever the width; arithmetic grows with it."""
    of_lm = (lm.model.config, lm.drafter.draft, lm.params, lm.branch)
    works = overhead.work_of_parts(*of_lm, batch=1, context=0)
    assert set(works) == {"early", "exit", *(("verify", width) for width in lm.drafter.draft.widths)}
    least = min(lm.drafter.draft.widths)
    keys = [lm.branch.block[name] for name in ("wk", "wv")]
    of_model = sum(leaf.nbytes for leaf in jax.tree.leaves(stored.read((lm.params, keys))))
    embedding = 0 if lm.model.config.tie_embeddings else lm.params["embed"].nbytes
    assert works["early"].bytes + works["verify", least].bytes == of_model - embedding
    assert {works["verify", width].bytes for width in lm.drafter.draft.widths} == {works["verify", least].bytes}
    assert works["verify", 3].flops * least == 3 * works["verify", least].flops
    behind, rows = (overhead.work_of_parts(*of_lm, batch=batch, context=10) for batch in (1, 4))
    cache = lm.prefill([[5, 9, 200, 31]], [0], 1, 20, Fixed(0)).cache
    slots = cache.k[0].shape[-1]
    assert behind["early"].bytes - works["early"].bytes == 10 * (cache.k[0].nbytes + cache.v[0].nbytes) // slots
    assert rows["early"].flops == 4 * behind["early"].flops

    sample = overhead.Sample(round=1.0, bare=1.0, early=0.1, exit=0.2, verify=0.3, decisions=0.0)
    samples = {("beta", drafts): [sample._replace(verify=0.3 * (1 + drafts))] for drafts in range(3)}
    rows = {row["part"]: row for row in overhead.part_rows(samples, works, lm.drafter.draft, bandwidth=1e6)}
    assert rows["verify 3"]["taken"] == pytest.approx(600)  # the one width that is compiled here
    assert rows["verify 3"]["ratio"] == pytest.approx(0.6 * 1e6 / works["verify", 3].bytes)


@pytest.mark.parametrize("drafts", [0, 1, 2])
def test_a_led_controller_drafts_as_told_and_learns_as_ever(overhead, lm, drafts):
    """The posterior after some rounds is what the same rounds teach the controller by itself."""
    leading = overhead.Leading(BETA, drafts)
    state = lm.decode(lm.prefill(PROMPTS, [0, 1], 2, 20, leading), SamplingConfig(), leading, 3)
    log = jax.device_get(state.draft.log)
    np.testing.assert_array_equal(log.drafted[:, :3], drafts)
    learned = BETA.init(2)
    for drafted, accepted in zip(log.drafted.T[:3], log.accepted.T[:3], strict=True):
        learned = BETA.update(learned, None, Outcome(drafted=jnp.array(drafted), accepted=jnp.array(accepted), replaced=jnp.zeros(2, bool)))
    np.testing.assert_allclose(state.draft.controller.alpha, learned.alpha, rtol=1e-6)
    np.testing.assert_allclose(state.draft.controller.beta, learned.beta, rtol=1e-6)


def test_the_parts_write_what_a_round_writes(overhead, lm):
    """After a round without drafts and after its parts, the caches hold the same at the last committed token's place."""

    def start():
        return lm.prefill([[5, 9, 200, 31]], [0], 1, 20, Fixed(0))

    after = lm.decode(start(), SamplingConfig(), Fixed(0), 1)
    parts = overhead.Parts(lm, overhead.greedy(1)).loops()
    early = parts["early"](start(), jnp.int32(1))
    written = after.cache.v[0][0, :, 3], early.cache.v[0][0, :, 3]
    np.testing.assert_allclose(*written, rtol=1e-5)
    assert np.abs(written[0]).max() > 0
    assert (early.length == after.length - 1).all()  # parts commit nothing, so that they can be repeated
