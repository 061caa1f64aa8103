"""`benchmarks/controllers.py`: the real controllers on synthetic texts, through the command line."""

import functools
import json

import commands
import pytest

CONTROLLERS = ("plain", "fixed:2", "threshold:0.6", "beta", "beta:plain", "calibrated", "cost_aware")


@pytest.fixture(scope="module")
def run():
    with commands.loaded("benchmarks/controllers.py") as module:
        yield functools.partial(commands.run, module, "--prompts=2", "--tokens=24")


def test_every_controller_is_played_and_none_beats_the_clairvoyant(run, tmp_path):
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps({"exit": [1.0, 1.2, 1.5], "look_up": []}))  # as the decoder keeps them
    result = run(f"--cost={costs}", f"--controllers={','.join(CONTROLLERS)}", f"--json={tmp_path / 'result.json'}")
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["cost"] == [1.0, 1.2, 1.5]
    for name, row in found["processes"].items():
        assert set(row["controllers"]) == set(CONTROLLERS)
        for played in row["controllers"].values():
            assert 0 < played["relative_to_clairvoyant"] <= 1 + 1e-6, name
        # The sweep of fixed lengths has 0 and 2 in it, too.
        assert max(row["controllers"][one]["relative_to_best_fixed"] for one in ("plain", "fixed:2")) <= 1 + 1e-6


@pytest.mark.parametrize("cost", ["cheap", "1", "1,0", "1,x", "{}"])
def test_costs_that_are_none_end_with_one_line(run, cost):
    commands.assert_refused(run(f"--cost={cost}"), f"error: --cost is {cost!r}")
