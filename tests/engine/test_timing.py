"""What rounds cost, measured once and kept on disk."""

import json
import pathlib
import types

import jax.numpy as jnp
import pytest
import tiny

from eesd_jax import DecodeConfig, Engine, UserError
from eesd_jax.config import DraftConfig
from eesd_jax.decode.controllers import Calibration
from eesd_jax.decode.costs import RoundCosts
from eesd_jax.engine import timing
from eesd_jax.engine.drafter import Drafter
from eesd_jax.model.exit_branch import init_exit_branch
from eesd_jax.model.stored import Codes, Stored


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where cost files lie; it does not exist yet."""
    monkeypatch.setenv("EESD_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "costs"


def fake_engine(dtype=jnp.float32, draft=DraftConfig(1, 2, ()), options=DecodeConfig(), head=(320, 32), **model) -> types.SimpleNamespace:
    """As much of an engine as a cost file's name needs."""
    config = tiny.config(**{"max_position_embeddings": 4096, **model})
    params = {"embed": jnp.zeros((4, 4), dtype), "final_norm": jnp.zeros(4, dtype)}
    return types.SimpleNamespace(
        model=types.SimpleNamespace(config=config),
        decode_config=options,
        drafter=Drafter(None, draft, Calibration(), trained=False),
        params=params,
        branch=jnp.zeros(head, dtype),
    )


@pytest.fixture
def measurements(monkeypatch) -> list[int]:
    """The batches that were measured; each measurement gives other numbers."""
    batches = []

    def measure(engine, batch):
        batches.append(batch)
        draft = engine.drafter.draft
        seconds = tuple(len(batches) + length / 7 for length in range(draft.max_draft + 1))
        return RoundCosts(seconds, tuple(second + 0.5 for second in seconds) if draft.longest_match else ())

    monkeypatch.setattr(timing, "measure", measure)
    return batches


def test_costs_are_those_of_a_quiet_machine_though_it_is_not():
    order, quiet = [0, 1, -2, 0], [1.0, 1.2, 1.5, 1.0]
    slower = [1.0, 3.0, 1.0, 2.0, 1.0]  # each repeat as a whole
    times = [[factor * seconds for seconds in quiet] for factor in slower]
    times[2] = [1.0, 9.0, 1.5, 1.0]  # and one of its rounds
    assert timing.combine(order, times) == pytest.approx({0: 1.0, 1: 1.2, -2: 1.5})


def test_rounds_that_one_width_holds_are_timed_once(monkeypatch):
    draft = DraftConfig(1, 6, (1, 2, 4), longest_match=3)
    assert draft.widths == (1, 2, 4, 7)
    engine, timed, state = fake_engine(draft=draft), [], jnp.zeros(())
    engine.prefill, engine.decode = lambda *args: state, lambda state, sampling, controller, steps: timed.append(controller.forced) or state
    monkeypatch.setattr(timing, "endless", lambda engine: engine)
    monkeypatch.setattr(timing, "combine", lambda order, times: {length: 1.0 - length / 10 for length in order})
    costs = timing.measure(engine, 1)
    assert costs.exit == (1.0,) * 7
    assert costs.look_up == (1.0, 1.1, 1.3, 1.3, 1.6, 1.6, 1.6)
    assert set(timed) == {0, -1, -3, -6}


def test_costs_are_measured_once_and_kept_to_the_last_digit(folder, measurements):
    first = timing.round_costs(fake_engine(), 1)
    assert first == RoundCosts((1.0, 1 + 1 / 7, 1 + 2 / 7), ())
    assert timing.round_costs(fake_engine(), 1) == first
    assert measurements == [1]
    (file,) = folder.iterdir()
    assert json.loads(file.read_text())["exit"] == list(first.exit)
    with_lookup = fake_engine(draft=DraftConfig(1, 2, (), longest_match=3))
    costs = timing.round_costs(with_lookup, 1)
    assert costs.look_up == (2.5, 2.5 + 1 / 7, 2.5 + 2 / 7)
    assert timing.round_costs(with_lookup, 1) == costs
    assert measurements == [1, 1]


@pytest.mark.parametrize(
    "content",
    [
        *(
            b"",
            b"{",
            b'{"exit": [1.0, 2.0',
            b"\xff\xfe\x00",
            b"null",
            b"[1, 2, 3]",
            b"{}",
            b'{"look_up": []}',
            b'{"exit": [1.0, 2.0, 3.0]}',
        ),
        *(b'{"exit": [1.0, 2.0, 3.0], "look_up": null}', b'{"exit": [1.0, 2.0, 3.0], "look_up": [1.0, 2.0, 3.0]}'),
        *(
            b'{"exit": ' + seconds + b', "look_up": []}'
            for seconds in (
                *(b"null", b"3", b"[1.0, 2.0]", b"[1.0, 2.0, 3.0, 4.0]", b"[]", b'"123"', b"{}", b"[1.0, 0.0, 3.0]"),
                *(b"[1.0, -2.0, 3.0]", b"[1.0, NaN, 3.0]", b"[1.0, Infinity, 3.0]", b"[1.0, [2.0], 3.0]", b"[1.0, null, 3.0]"),
                *(b'[1.0, "2.0", 3.0]', b"[1.0, 1" + b"0" * 400 + b", 3.0]"),
            )
        ),
    ],
)
def test_a_file_that_holds_no_costs_is_measured_again_and_replaced(folder, measurements, content: bytes):
    timing.round_costs(fake_engine(), 1)
    (file,) = folder.iterdir()
    file.write_bytes(content)
    again = timing.round_costs(fake_engine(), 1)
    assert measurements == [1, 1]
    assert timing.round_costs(fake_engine(), 1) == again
    assert measurements == [1, 1]
    assert list(folder.iterdir()) == [file]


def test_a_write_that_breaks_off_leaves_nothing(folder, measurements, monkeypatch):
    write = pathlib.Path.write_bytes

    def half(path, content):
        write(path, content[: len(content) // 2])
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.write_bytes", half)
    with pytest.warns(UserWarning, match="no space left"):
        assert timing.round_costs(fake_engine(), 1).exit == (1.0, 1 + 1 / 7, 1 + 2 / 7)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_warned_of(folder, measurements):
    folder.parent.parent.mkdir(exist_ok=True)
    folder.parent.write_text("a file where the cache folder should be")
    with pytest.warns(UserWarning, match="measured at every start"):
        timing.round_costs(fake_engine(), 1)
    assert measurements == [1]


def test_whatever_changes_the_cost_is_measured_on_its_own(folder, measurements):
    coded = fake_engine()
    coded.params |= {"embed": Stored(coded.params["embed"], Codes(jnp.zeros((4, 32), jnp.int8), jnp.zeros((4, 1)), None))}
    others = [
        (fake_engine(), 2),
        (fake_engine(dtype=jnp.bfloat16), 1),
        (fake_engine(num_hidden_layers=4), 1),
        (fake_engine(head=(100, 32)), 1),
        (fake_engine(draft=DraftConfig(2, 2, ())), 1),
        (fake_engine(draft=DraftConfig(1, 3, ())), 1),
        (fake_engine(draft=DraftConfig(1, 2, (2,))), 1),
        (fake_engine(draft=DraftConfig(1, 2, (), longest_match=3)), 1),
        (fake_engine(options=DecodeConfig(max_new_tokens=2000)), 1),  # a longer cache
        (coded, 1),
    ]
    for engine, batch in [(fake_engine(), 1), *others]:
        timing.round_costs(engine, batch)
    assert len(measurements) == 1 + len(others)
    assert len(list(folder.iterdir())) == 1 + len(others)
    # A budget that ends in the same bucket is the same cost.
    timing.round_costs(fake_engine(options=DecodeConfig(max_new_tokens=DecodeConfig.max_new_tokens - 1)), 1)
    assert len(measurements) == 1 + len(others)


def test_a_real_engine_is_timed_and_its_controller_drafts_by_what_was_found(folder):
    model = tiny.loaded_model()
    branch = init_exit_branch(model.config, model.params, 1, "zero")
    options = DecodeConfig(max_new_tokens=6, prompt_buckets=(32,), min_capacity=64)
    engine = Engine(model, options, Drafter(branch, DraftConfig(1, 2, ()), Calibration(1.1, 0.1), trained=False))
    controller = engine.controller("cost_aware", batch=2)
    assert len(controller.cost) == 3
    assert all(cost > 0 for cost in controller.cost)
    assert controller.calibration == Calibration(1.1, 0.1)
    (file,) = folder.iterdir()
    written = {"exit": [1.0, 100.0, 200.0], "look_up": []}
    file.write_text(json.dumps(written))
    plain, dear = (
        engine.generate_ids([[5, 6, 7], [8]], seeds=[0, 1], controller=chosen)
        for chosen in (None, engine.controller("cost_aware", batch=2))
    )
    assert [text.token_ids for text in dear] == [text.token_ids for text in plain]
    assert sum(text.drafted for text in dear) == 0


def test_without_a_word_about_control_what_can_draft_does(monkeypatch):
    monkeypatch.setattr(timing, "round_costs", lambda engine, batch: RoundCosts((1.0,) * 3, (1.0,) * 3))
    model, options = tiny.loaded_model(num_hidden_layers=2), {"prompts": [[5, 6, 7, 5, 6]], "seeds": [0], "max_new_tokens": 8}
    drafter = Drafter(None, DraftConfig(0, max_draft=2, longest_match=2), Calibration(), trained=False)
    engine, without = Engine(model, drafter=drafter), Engine(model)
    assert engine.generate_ids(**options)[0].log.drafted.sum() > 0
    assert engine.generate_ids(**options, controller=None)[0].log.drafted.sum() == 0
    assert without.generate_ids(**options)[0].log.drafted.sum() == 0
    with pytest.raises(UserError, match="needs an exit branch or lookup"):
        without.generate_ids(**options, controller="cost_aware")
