"""A program is compiled once for its batch, bucket and controller, on one device and on a mesh, whatever is asked of it."""

import dataclasses
import pathlib

import compiled
import pytest
import tiny

import eesd_jax
from eesd_jax import DecodeConfig, Engine, SamplingConfig
from eesd_jax.decode.controllers import Calibration, Controller, Setup, build_controller, parse_controller
from eesd_jax.decode.costs import RoundCosts
from eesd_jax.decode.sources.bandit import Arms
from eesd_jax.engine import timing
from eesd_jax.model.config import ModelConfig
from eesd_jax.model.exit_branch import init_exit_branch
from eesd_jax.model.sharding import make_mesh
from eesd_jax.weights import branch_folder

OPTIONS = DecodeConfig(max_new_tokens=12, prompt_buckets=(16,), min_capacity=64, stream_chunk=4, chunk=8)
PROMPTS = ([[5, 9, 200], [7]], [[250]], [[11, 12, 13, 14], [8, 9]])  # the second leaves a row empty

MESHES = {"one device": None, "fsdp": {"fsdp": 2}, "tensor": {"tensor": 2}, "data": {"data": 2}}
SLOW = ("fsdp", "tensor", "data")


@pytest.fixture(
    scope="module", params=[pytest.param(mesh, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, mesh in MESHES.items()]
)
def lm(request, tmp_path_factory) -> Engine:
    """A model and a branch of one draft at most, from files; heads that a mesh of two cannot share out evenly."""
    folder = tmp_path_factory.mktemp("model")
    hf = tiny.hf_config(hidden_size=24, num_attention_heads=3, num_key_value_heads=3)
    tiny.write_folder(folder / "model", hf, with_tokenizer=True)
    config, mesh = ModelConfig.from_hf(hf, "tiny"), make_mesh(**request.param) if request.param else None
    params = tiny.params(config)
    branch = init_exit_branch(config, params, 1, "zero")
    info = branch_folder.describe(config, params, branch, exit_layer=1, start="zero", calibration=(1.0, 0.0), training={})
    branch_folder.save_branch(folder / "branch", branch, info)
    return eesd_jax.load(
        str(folder / "model"), dtype="float32", mesh=mesh, decode_config=OPTIONS, exit_branch=str(folder / "branch"), max_draft=1
    )


def controller(name: str, costs: RoundCosts = RoundCosts(exit=(1.0, 1.1), look_up=(1.0, 1.05))) -> Controller:
    """Of both sources, by default with costs that are the same on every machine."""
    return build_controller(parse_controller(name, 1), Setup(calibration=Calibration(), costs=costs, has_lookup=True))


def answer(lm: Engine, controller: Controller | None) -> list[list[int]]:
    """All that may be asked of one program: other prompts, an empty row, other settings, stop strings, chunks and a budget."""
    tokens = []
    for prompts in PROMPTS:
        tokens += [one.token_ids for one in lm.generate_ids(prompts, seeds=[0] * len(prompts), batch_size=2, controller=controller)]
    sampling = SamplingConfig(temperature=0.8, top_p=0.9)
    lm.generate_ids(PROMPTS[0], seeds=[1, 2], batch_size=2, controller=controller, sampling=sampling, max_new_tokens=5)
    text = lm.generate_ids(PROMPTS[0], seeds=[1, 2], batch_size=2, controller=controller)[0].text
    stopped = lm.generate_ids(PROMPTS[0], seeds=[1, 2], batch_size=2, controller=controller, stop=[text[1:3]])
    assert stopped[0].finish_reason == "stop"  # a row that the host has ended, beside one that goes on
    return tokens


def test_one_compilation_for_each_controller(lm: Engine):
    with compiled.programs() as counts:
        plain = answer(lm, None)
        for number, name in enumerate(["fixed:1", "beta"], start=1):
            assert answer(lm, controller(name)) == plain
            assert counts["_decode_speculative"] == number
    assert counts["_decode_plain"] == 1
    assert counts["prefill"] == 2  # with the branch's cache, and without
    assert counts["start_drafting"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("lm", [None], indirect=True, ids=["one device"])
def test_another_bucket_and_another_batch_are_other_programs(lm: Engine):
    with compiled.programs() as counts:
        for prompts, batch in (([[5]], 1), ([list(range(61))], 1), ([[5]], 2), ([list(range(55))], 1)):
            lm.generate_ids(prompts, seeds=[0], batch_size=batch, controller=controller("beta"))
    assert counts["_decode_speculative"] == 3  # the last one's capacity is that of the second
    assert counts["prefill"] == 3


@dataclasses.dataclass(frozen=True)
class Own(Arms):
    """A controller that nobody has made known to JAX."""


@pytest.mark.parametrize("lm", [None], indirect=True, ids=["one device"])
def test_what_measures_costs_and_other_numbers_are_the_same_program(lm: Engine):
    """Lengths, thresholds and costs are arguments, also of a class of one's own."""
    plain = answer(lm, None)
    with compiled.programs() as counts:
        costs = timing.measure(lm, 2)
        assert len(costs.exit) == len(costs.look_up) == 2
        assert answer(lm, controller("cost_aware", costs)) == answer(lm, controller("cost_aware")) == plain
        assert counts["_decode_speculative"] == 1
        costs = RoundCosts(exit=(1.0, 1.0), look_up=(1.0, 9.0))  # the branch drafts wherever it may
        fixed = [controller(f"fixed:{length}", costs) for length in (0, 1)]
        for controllers, programs in ((fixed, 2), ([Own(**vars(one)) for one in fixed], 3)):
            drafted = [sum(text.drafted for text in lm.generate_ids(PROMPTS[0], seeds=[0, 0], controller=one)) for one in controllers]
            assert drafted[0] < drafted[1]
            assert counts["_decode_speculative"] == programs


def test_costs_belong_to_all_code_that_decodes():
    package = pathlib.Path(eesd_jax.__file__).parent
    covered = {file.relative_to(package).as_posix() for file in timing.code_files()}
    rooms = ("model", "kernels", "decode", "engine")
    assert {file.relative_to(package).as_posix() for room in rooms for file in (package / room).rglob("*.py")} <= covered
    # Files that would be missed first if rooms moved or were not gone down into.
    assert {"engine/engine.py", "engine/timing.py", "decode/round.py", "decode/sources/bandit.py", "kernels/cpu/tiles.py"} <= covered
