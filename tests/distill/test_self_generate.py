"""Self-generation: refilling changes no response, a run can be killed anywhere, processes share the work, mistakes are one line."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import surroundings
import tensorflow_datasets as tfds
import tiny
from coded import engines

from eesd_jax.config import BranchConfig, CacheConfig, DataConfig, DraftConfig, ExperimentConfig, RefillConfig, SelfGenerateConfig
from eesd_jax.decode.controllers import Calibration
from eesd_jax.distill import data, feature_file, prompt_source, self_generate, teacher
from eesd_jax.engine import scheduler
from eesd_jax.engine.drafter import Drafter
from eesd_jax.engine.engine import Engine
from eesd_jax.engine.scheduler import Refiller, Request, local_mesh
from eesd_jax.errors import UserError
from eesd_jax.model import ops, sharding
from eesd_jax.model.exit_branch import init_exit_branch
from eesd_jax.model.stored import Stored

SCRIPT = pathlib.Path(__file__).parent.parent.parent / "train" / "self_generate.py"
PACING = RefillConfig(prompt_buckets=(16, 32), cache_buckets=(32, 64), chunk=4, prefill_rows=3)
BUDGET = 18


@pytest.fixture(scope="module")
def engine():
    model = tiny.loaded_model()
    # Many tokens end a text, so that responses are of many lengths.
    model = model._replace(eos_ids=(model.eos_ids[0], *range(100, 125)))
    branch = init_exit_branch(model.config, model.params, 1, "zero")
    return Engine(model, drafter=Drafter(branch, DraftConfig(1, 2), Calibration(), trained=False))


@pytest.fixture(scope="module")
def requests():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, 17)
    return [Request(100 + i, rng.integers(3, 300, length).tolist(), (0.0, 1.0)[i % 2], BUDGET) for i, length in enumerate(lengths)]


def responses(engine, requests, *, devices=1, rows=4, controller=None, pacing=PACING):
    mesh = sharding.make_mesh(data=devices)
    found = list(Refiller(engine, mesh, rows, controller, pacing).run(requests, jax.random.key(5)))
    assert len(found) == len({response.index for response in found}) == len(requests)
    return {response.index: (response.tokens.tolist(), response.ended) for response in found}


@pytest.fixture(scope="module")
def plain_responses(engine, requests):
    return responses(engine, requests)


def test_a_refilled_row_says_what_it_says_alone(engine, requests, plain_responses):
    lengths = set()
    for request in requests:
        tokens, ended = plain_responses[request.index]
        lengths.add(len(tokens))
        assert ended == (tokens[-1] in engine.model.eos_ids)
        assert not set(tokens[:-1]) & set(engine.model.eos_ids)
        assert ended or len(tokens) == BUDGET
        if request.temperature == 0:
            alone = engine.generate_ids([request.prompt], seeds=[0], max_new_tokens=BUDGET)[0]
            assert tokens == alone.token_ids
    assert len(lengths) > 4


def test_responses_do_not_depend_on_what_runs_beside_them(engine, requests, plain_responses):
    some = requests[::-3]
    assert responses(engine, some) == {request.index: plain_responses[request.index] for request in some}


def test_devices_share_the_rows(engine, requests, plain_responses):
    assert responses(engine, requests, devices=2, rows=8) == plain_responses


def test_several_prompts_can_be_run_at_once(engine, requests, plain_responses, monkeypatch):
    # As on accelerators; on CPU one prompt is run at a time.
    monkeypatch.setattr(scheduler, "_platform", lambda mesh: "tpu")
    assert responses(engine, requests) == plain_responses
    assert responses(engine, requests, devices=2, rows=8) == plain_responses


def test_generating_by_eesd_gives_the_same_greedy_responses(engine, requests, plain_responses):
    found = responses(engine, requests, controller=engine.controller("fixed:2"))
    greedy = [request.index for request in requests if request.temperature == 0]
    assert {index: found[index] for index in greedy} == {index: plain_responses[index] for index in greedy}
    assert all(tokens and len(tokens) <= BUDGET for tokens, _ in found.values())


def test_keys_follow_from_the_run_and_the_index(engine, requests, plain_responses):
    renamed = [request._replace(index=request.index + 50) for request in requests]
    found = responses(engine, renamed)
    same = [found[request.index + 50] == plain_responses[request.index] for request in requests]
    greedy = [request.temperature == 0 for request in requests]
    assert all(one for one, is_greedy in zip(same, greedy, strict=True) if is_greedy)
    assert not all(same)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_temperatures_are_taken_in_turn_beside_the_greedy_share(share):
    config = SelfGenerateConfig(greedy_share=share, temperatures=(0.7, 1.0, 1.3))
    plan = self_generate.plan_responses(config, 40, 40)
    assert np.count_nonzero(plan.temperature == 0) == share * 40
    sampled = plan.temperature[plan.temperature > 0]
    assert sampled.tolist() == pytest.approx([(0.7, 1.0, 1.3)[i % 3] for i in range(len(sampled))])
    assert plan.prompt.tolist() == list(range(40))


@pytest.mark.parametrize("prompts", [7, 8])
def test_no_prompt_is_answered_greedily_twice(prompts):
    plan = self_generate.plan_responses(SelfGenerateConfig(greedy_share=0.5), prompts, 3 * prompts)
    greedy = plan.prompt[plan.temperature == 0]
    assert len(set(greedy)) == len(greedy)
    assert len(greedy) >= prompts - 1
    assert np.bincount(plan.prompt).tolist() == [3] * prompts


# Whole runs, with a model that is loaded already.


@pytest.fixture
def loaded(engine, monkeypatch):
    monkeypatch.setattr(self_generate, "_load", lambda config, mesh: engine)
    monkeypatch.setattr(self_generate, "local_mesh", lambda model_parallel: sharding.make_mesh())
    monkeypatch.setattr(self_generate, "_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(self_generate.Run.__init__, "__defaults__", (None, PACING))


@pytest.fixture
def config(tmp_path):
    lines = [json.dumps({"id": f"p{i}", "prompt": f"the quick fox {i} " * (1 + i % 3)}) for i in range(9)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    ours = SelfGenerateConfig(
        prompts=str(tmp_path / "prompts.jsonl"), num_responses=14, max_new_tokens=BUDGET, batch_size=4, validation_share=0.2, seed=3
    )
    return ExperimentConfig(model="tiny", output_dir=str(tmp_path / "out"), self_generate=ours)


def in_folder(config, name):
    return dataclasses.replace(config, output_dir=str(pathlib.Path(config.output_dir).parent / name))


def with_fields(config, **fields):
    return dataclasses.replace(config, self_generate=dataclasses.replace(config.self_generate, **fields))


def digests(config):
    folder = pathlib.Path(config.output_dir) / "dataset"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def journal_of(config, process=0):
    return pathlib.Path(config.output_dir) / "responses" / f"{process:05d}.jsonl"


def wait_not_forever(ready, what_for):
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline, what_for
        time.sleep(0.05)


def leftovers(config):
    return [path.name for path in pathlib.Path(config.output_dir).iterdir() if path.name not in ("dataset", "responses")]


@pytest.fixture
def uninterrupted(loaded, config):
    config = in_folder(config, "uninterrupted")
    self_generate.self_generate(config)
    return digests(config)


def test_the_dataset_holds_every_response_with_its_prompt(loaded, config, engine):
    seen = []
    summary = self_generate.self_generate(config, watch=seen.append)
    assert (summary.responses, summary.folder) == (14, str(pathlib.Path(config.output_dir) / "dataset"))
    assert (seen[0].done, seen[-1].done, seen[-1].total, seen[-1].tokens) == (0, 14, 14, summary.tokens)
    assert f"14 responses, {summary.tokens} tokens in" in summary.line
    assert not leftovers(config)
    builder = tfds.builder_from_directory(summary.folder)
    provenance = builder.info.metadata["provenance"]
    records = [record for split in builder.info.splits for record in builder.as_data_source(split)]
    assert sorted(record["index"] for record in records) == list(range(14))
    assert sum(int(record["response"].sum()) for record in records) == summary.tokens == provenance["response_tokens"]
    texts = [json.loads(line)["prompt"] for line in pathlib.Path(config.self_generate.prompts).read_text().splitlines()]
    split_of = {}
    for split in builder.info.splits:
        for record in builder.as_data_source(split):
            prompt = engine.encode(texts[record["index"] % 9])
            assert record["prompt_id"] == f"p{record['index'] % 9}".encode()
            assert record["tokens"][: len(prompt)].tolist() == prompt
            assert record["response"].tolist() == [False] * len(prompt) + [True] * (len(record["tokens"]) - len(prompt))
            assert split_of.setdefault(record["prompt_id"], split) == split
            if record["temperature"] == 0:
                alone = engine.generate_ids([prompt], seeds=[0], max_new_tokens=BUDGET)[0]
                assert record["tokens"][len(prompt) :].tolist() == alone.token_ids
    assert set(split_of.values()) == {"train", "validation"}
    assert (provenance["responses"], provenance["model"]) == (14, "tiny")
    assert provenance["settings"]["temperatures"] == [0.7, 1.0]
    assert provenance["splits"] == {split: len(builder.as_data_source(split)) for split in ("train", "validation")}


def test_the_dataset_is_what_training_reads(loaded, config, engine):
    summary = self_generate.self_generate(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = data.open_split(DataConfig(sequence_length=64), summary.folder, "train", engine.model)
        held_out = data.open_split(DataConfig(sequence_length=64), summary.folder, "validation", engine.model)
    assert rows.num_response_tokens + held_out.num_response_tokens == summary.tokens
    assert rows.provenance["target_fingerprint"]


def test_a_finished_run_started_again_changes_nothing(loaded, config, monkeypatch):
    self_generate.self_generate(config)
    times = {path: path.stat().st_mtime_ns for path in pathlib.Path(config.output_dir).rglob("*")}
    monkeypatch.setattr(self_generate, "_load", None)  # nor does it load the model
    summary = self_generate.self_generate(config)
    assert summary.responses == 0
    assert summary.line.startswith("nothing left to generate")
    assert {path: path.stat().st_mtime_ns for path in pathlib.Path(config.output_dir).rglob("*")} == times


@pytest.mark.parametrize("share", [0.0, 0.31, 0.62, 0.999])
def test_a_journal_cut_anywhere_gives_the_same_dataset(loaded, config, uninterrupted, share):
    self_generate.self_generate(config)
    folder = pathlib.Path(config.output_dir)
    for path in (folder / "dataset").iterdir():
        path.unlink()
    (folder / "dataset").rmdir()
    (folder / ".dataset-partial-killed").mkdir()  # as when it was killed while the dataset was written
    content = journal_of(config).read_bytes()
    journal_of(config).write_bytes(content[: int(share * len(content))])
    kept = content[: int(share * len(content))].count(b"\n")
    summary = self_generate.self_generate(config)
    assert summary.responses == 14 - kept
    assert digests(config) == uninterrupted
    assert not leftovers(config)
    indices = [json.loads(line)["index"] for line in journal_of(config).read_text().splitlines()]
    assert sorted(indices) == list(range(14))


def kept_with(config, **fields):
    return dataclasses.replace(
        with_fields(config, features=True, **fields),
        branch=BranchConfig(exit_layer=1),
        cache=CacheConfig(enabled=True, top_tokens=5, dtype="float32"),
        data=DataConfig(sequence_length=90),
    )


def features_of(config, model):
    folder = f"{config.output_dir}/dataset"
    found, splits = feature_file.open_features(folder), ("train", "validation")
    examples = [one for split in splits for one in data.open_split(DataConfig(sequence_length=90), folder, split, model).examples]
    assert sorted(one.index for one in examples) == list(range(14))
    return {one.index: found.of_example(one).tobytes() for one in examples}


@pytest.mark.parametrize("share", [0.31, 0.8])
def test_features_are_the_same_to_the_bit_wherever_a_run_is_cut(loaded, config, engine, uninterrupted, share):
    whole, config = kept_with(in_folder(config, "whole")), kept_with(config)
    self_generate.self_generate(whole)
    assert {name: value for name, value in digests(whole).items() if "array_record" in name} == {
        name: value for name, value in uninterrupted.items() if "array_record" in name
    }
    for name in ("responses", "features"):
        shutil.copytree(f"{whole.output_dir}/{name}", f"{config.output_dir}/{name}")
    content = journal_of(config).read_bytes()
    journal_of(config).write_bytes(content[: int(share * len(content))])
    with open(f"{config.output_dir}/features/00000.bin", "ab") as file:
        file.write(b"torn")
    self_generate.self_generate(config)
    assert features_of(config, engine.model) == features_of(whole, engine.model)
    with pytest.raises(UserError, match=r"features\.exit_layer was 1, and now is 2"):
        self_generate.self_generate(dataclasses.replace(whole, branch=BranchConfig(exit_layer=2)))


def test_two_processes_keep_the_features_of_one(loaded, config, engine, monkeypatch):
    monkeypatch.setattr(self_generate, "_wait", wait_not_forever)
    whole, config = kept_with(in_folder(config, "whole")), kept_with(config)
    self_generate.self_generate(whole)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(self_generate.self_generate, config, process_index=process, process_count=2) for process in (0, 1)]
    assert sum(run.result().responses for run in runs) == 14
    assert {path.name for path in pathlib.Path(config.output_dir, "features").glob("*.bin")} == {"00000.bin", "00001.bin"}
    assert features_of(config, engine.model) == features_of(whole, engine.model)


class _Reversed:
    """Rows whose examples say other things."""

    def __init__(self, rows):
        self._rows = rows

    def members(self, index):
        return [example._replace(tokens=example.tokens[::-1]) for example in self._rows.members(index)]


def test_features_are_those_of_a_pass_over_the_text(loaded, config, engine):
    config = kept_with(config)
    folder = self_generate.self_generate(config).folder
    found = feature_file.open_features(folder)
    trunk = teacher.split_trunk(engine.model.config, jax.tree.map(jnp.copy, engine.model.params), 1)
    rows = data.open_split(DataConfig(sequence_length=90), folder, "train", engine.model)
    batch = data.Batch(*(np.stack(field) for field in zip(*rows, strict=True)))
    kept = found.of_batch(rows, batch)
    hidden, last = teacher.hidden_states(engine.model.config, trunk, batch, last=True)
    top = teacher.top_tokens(trunk, last, 5, 32)
    ends = np.concatenate([batch.positions[:, 1:] == 0, np.ones((len(rows), 1), bool)], axis=1)  # of texts and of rows
    run = (batch.segments > 0) & ~ends
    assert run.any() and batch.loss_mask.any() and not (batch.loss_mask & ~run).any()
    np.testing.assert_allclose(kept.hidden[run], hidden[run], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(kept.last[run], last[run], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(kept.top.log_probs[batch.loss_mask], top.log_probs[batch.loss_mask], atol=1e-3)
    assert (kept.top.ids == top.ids)[batch.loss_mask].mean() > 0.99
    with pytest.raises(UserError, match="they are of another text than response"):  # features that lie beside another dataset
        found.of_batch(_Reversed(rows), batch)
    damages = {"index.npy": b"no array", "provenance.json": b"[]", "00000.bin": b"short"}
    for name, content in damages.items():
        path = pathlib.Path(folder).parent / "features" / name
        whole = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"features .* cannot be read .*; expected those that train/self_generate.py has written"):
            feature_file.open_features(folder)
        path.write_bytes(whole)


def test_features_that_cannot_be_kept_are_refused(loaded, config):
    for fields in ({"controller": "fixed:2", "exit_branch": "demo"}, {"max_prompt_tokens": 600}):
        with pytest.raises(
            UserError, match=r"self_generate\.features is True with .*; expected plain, a folder of this machine, and at most 512"
        ):
            self_generate.self_generate(kept_with(config, **fields))
    config = kept_with(config)
    for fields in ({"branch": BranchConfig(exit_layer=99)}, {"cache": CacheConfig(enabled=True, top_tokens=10**6)}):
        with pytest.raises(UserError, match=r"(exit_layer|top_tokens).*expected"):
            self_generate.self_generate(dataclasses.replace(config, **fields))


def test_two_processes_give_the_dataset_of_one(loaded, config, uninterrupted, monkeypatch):
    monkeypatch.setattr(self_generate, "_wait", wait_not_forever)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(self_generate.self_generate, config, process_index=process, process_count=2) for process in (0, 1)]
    assert sum(run.result().responses for run in runs) == 14
    assert digests(config) == uninterrupted
    indices = [[json.loads(line)["index"] for line in journal_of(config, p).read_text().splitlines()] for p in (0, 1)]
    assert [sorted(some) for some in indices] == [list(range(0, 14, 2)), list(range(1, 14, 2))]


def test_another_number_of_processes_goes_on_where_they_stopped(loaded, config, uninterrupted):
    first = in_folder(config, "first")
    self_generate.self_generate(first)
    lines = journal_of(first).read_bytes().splitlines(keepends=True)
    journal_of(config).parent.mkdir(parents=True)
    for name in ("settings.json", "target.json"):
        (journal_of(config).parent / name).write_bytes((journal_of(first).parent / name).read_bytes())
    for process in range(3):
        torn = b'{"index": 13, "tok' if process == 2 else b""
        journal_of(config, process).write_bytes(b"".join(lines[3 * process : 3 * process + 3]) + torn)
    assert self_generate.self_generate(config).responses == 5
    assert digests(config) == uninterrupted


def test_the_model_writes_the_user_turn_too(loaded, config, engine):
    config = with_fields(config, prompts="self", num_responses=6)
    summary = self_generate.self_generate(config)
    entries = [json.loads(line) for line in journal_of(config).read_text().splitlines()]
    users = {entry["index"]: entry["user"] for entry in entries if "user" in entry}
    assert sorted(users) == list(range(6))
    assert len(set(users.values())) == 6
    builder = tfds.builder_from_directory(summary.folder)
    for split in builder.info.splits:
        for record in builder.as_data_source(split):
            prompt = record["tokens"][~record["response"]].tolist()
            assert prompt == engine.encode([{"role": "user", "content": users[int(record["index"])]}])
    # Cut within the user's turns, and once more within the answers.
    whole, journal = digests(config), journal_of(config).read_bytes()
    for share in (0.2, 0.8):
        again = in_folder(config, f"again{share}")
        journal_of(again).parent.mkdir(parents=True)
        for name in ("settings.json", "target.json"):
            (journal_of(again).parent / name).write_bytes((journal_of(config).parent / name).read_bytes())
        journal_of(again).write_bytes(journal[: int(share * len(journal))])
        self_generate.self_generate(again)
        assert digests(again) == whole


def test_other_settings_are_refused_with_the_fields_that_differ(loaded, config):
    self_generate.self_generate(config)
    message = r"seed was 3, and now is 4; expected the same"
    with pytest.raises(UserError, match=message):
        self_generate.self_generate(with_fields(config, seed=4))
    for path in (pathlib.Path(config.output_dir) / "dataset").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=message):
        self_generate.self_generate(with_fields(config, seed=4))
    pathlib.Path(config.self_generate.prompts).write_text('{"prompt": "another"}')
    with pytest.raises(UserError, match="prompts was '"):
        self_generate.self_generate(config)


def test_journals_of_another_model_are_refused(loaded, config, monkeypatch):
    self_generate.self_generate(config)
    for path in (pathlib.Path(config.output_dir) / "dataset").iterdir():
        path.unlink()
    monkeypatch.setattr(self_generate, "_load", lambda config, mesh: Engine(tiny.loaded_model(seed=1)))
    with pytest.raises(UserError, match="target_fingerprint was"):
        self_generate.self_generate(config)


def test_prompts_that_are_too_long_are_left_out(loaded, config, engine):
    texts = [json.loads(line)["prompt"] for line in pathlib.Path(config.self_generate.prompts).read_text().splitlines()]
    lengths = sorted(len(engine.encode(text)) for text in texts)
    fits = lengths[5]
    kept = sum(length <= fits for length in lengths)
    assert 0 < kept < 9
    with pytest.warns(UserWarning, match=f"{9 - kept} of 9 prompts are left out: more than {fits} tokens"):
        summary = self_generate.self_generate(with_fields(config, max_prompt_tokens=fits, num_responses=0))
    assert summary.responses == kept
    with pytest.raises(UserError, match="none of 9 fits into 2 tokens"):
        self_generate.self_generate(with_fields(in_folder(config, "none"), max_prompt_tokens=2))


def test_prompts_of_a_tfds_dataset(loaded, config, tmp_path):
    folder = tmp_path / "questions"
    folder.mkdir()
    features = tfds.features.FeaturesDict({"answer": tfds.features.Text(), "question": tfds.features.Text()})
    write_tfds(folder, features, [{"answer": "x", "question": text} for text in ("hello there", "", "日本?")])
    summary = self_generate.self_generate(with_fields(config, prompts=f"tfds:{folder}", num_responses=0))
    assert summary.responses == 2
    assert [conversation.turns for conversation in prompt_source.read(f"tfds:{folder}")] == [("hello there",), ("日本?",)]
    (tmp_path / "other").mkdir()
    write_tfds(tmp_path / "other", tfds.features.FeaturesDict({"label": np.int64}), [{"label": 1}])
    with pytest.raises(UserError, match="its fields are label; expected one of prompt, instruction, question"):
        prompt_source.read(f"tfds:{tmp_path / 'other'}")


def write_tfds(folder, features, records):
    identity = tfds.core.dataset_info.DatasetIdentity(
        name="questions", version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name="tests", config_name=None
    )
    writer = tfds.core.SequentialWriter(tfds.core.DatasetInfo(builder=identity, features=features), 10, file_format="array_record")
    writer.initialize_splits(["train"])
    writer.add_examples({"train": records})
    writer.close_all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompts": ""}, r"prompts is ''; expected a JSONL file"),
        ({"prompts": "nowhere.jsonl"}, "no such file"),
        ({"prompts": "tfds:nowhere"}, "prompts 'tfds:nowhere' cannot be read"),
        ({"prompts": "self", "num_responses": 0}, "num_responses is 0, and prompts are 'self'"),
        ({"num_responses": -1}, "num_responses is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperatures": (0.0,)}, "temperatures is"),
        ({"temperatures": ()}, "temperatures is"),
        ({"greedy_share": 1.5}, "greedy_share is 1.5"),
        ({"greedy_share": 1.0}, "num_responses is 14, all of them greedy, for 9 prompts"),
        ({"validation_share": 1.0}, "validation_share is 1.0"),
        ({"controller": "beta"}, "exit_branch is 'none' and controller 'beta'"),
        ({"controller": "wrong"}, "controller 'wrong' is unknown"),
        ({"exit_branch": "auto"}, "exit_branch is 'auto' and controller 'plain'"),
    ],
)
def test_settings_that_cannot_be_are_refused(loaded, config, fields, message):
    with pytest.raises(UserError, match=message):
        self_generate.self_generate(with_fields(config, **fields))
    assert not pathlib.Path(config.output_dir).exists()


def test_folders_and_files_that_cannot_be_used_are_refused(loaded, config, tmp_path):
    with pytest.raises(UserError, match="output_dir is ''"):
        self_generate.self_generate(dataclasses.replace(config, output_dir=""))
    with pytest.raises(UserError, match="cannot be used"):
        self_generate.self_generate(dataclasses.replace(config, output_dir=config.self_generate.prompts))
    with pytest.raises(UserError, match=r"gs://.* cannot be used"):
        self_generate.self_generate(dataclasses.replace(config, output_dir="gs://bucket/out"))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": ')
    with pytest.raises(UserError, match="line 2: not valid JSON"):
        self_generate.self_generate(with_fields(config, prompts=str(tmp_path / "bad.jsonl")))
    journal_of(config).parent.mkdir(parents=True)
    for line in ("[]", '{"index": 0, "tokens": [1], "ended": true, "features": [0, 1]}'):
        journal_of(config).write_text(f"{line}\n")
        with pytest.raises(UserError, match="line 1: no line of a journal"):
            self_generate.self_generate(config)


def test_a_model_without_a_template_cannot_write_prompts(loaded, config, engine, monkeypatch):
    tokenizer = type(engine.model.tokenizer)(tokenizer_object=engine.model.tokenizer.backend_tokenizer)
    monkeypatch.setattr(self_generate, "_load", lambda config, mesh: Engine(engine.model._replace(tokenizer=tokenizer)))
    with pytest.raises(UserError, match="this model has no chat template"):
        self_generate.self_generate(with_fields(config, prompts="self"))


# The command.


@pytest.fixture
def command(tmp_path, config):
    tiny.write_folder(tmp_path / "model", tiny.hf_config(), with_tokenizer=True)
    (tmp_path / "config.py").write_text(
        "from eesd_jax.distill.experiment import base_config\n\n\ndef get_config():\n    config = base_config()\n"
        f"    config.model = {str(tmp_path / 'model')!r}\n    config.self_generate.prompts = {config.self_generate.prompts!r}\n"
        "    config.self_generate.max_new_tokens = 60\n    config.self_generate.num_responses = 300\n"
        "    config.self_generate.batch_size = 4\n    return config\n"
    )

    def start(name, *arguments):
        line = [sys.executable, str(SCRIPT), f"--config={tmp_path / 'config.py'}", f"--config.output_dir={tmp_path / name}", *arguments]
        environment = os.environ | {"XLA_FLAGS": surroundings.xla_flags(1), "EESD_JAX_CACHE": str(tmp_path / "cache")}
        return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    return start


@pytest.mark.slow  # every run cuts the journal anywhere, in this process
def test_killed_at_any_moment_the_command_goes_on(command, tmp_path):
    journal = tmp_path / "killed" / "responses" / "00000.jsonl"
    for lines in (1, 120):
        process = command("killed")
        while not journal.exists() or journal.read_bytes().count(b"\n") < lines:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (tmp_path / "killed" / "dataset").exists()
    for name in ("killed", "whole"):
        process = command(name)
        out, err = process.communicate()
        assert (process.returncode, err) == (0, "")
        assert out.count("\n") == 1
        assert out.strip().endswith(f"dataset: {tmp_path / name / 'dataset'}")
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name / "dataset").iterdir()} for name in ("killed", "whole")]
    assert contents[0] == contents[1]


def test_mistakes_are_one_line_and_exit_code_2(command, tmp_path):
    process = command("out", "--config.model=nowhere/at/all")
    out, err = process.communicate()
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert "nowhere/at/all" in err
    assert not (tmp_path / "out").exists()


def test_an_open_axis_takes_all_devices():
    devices = jax.local_device_count()
    assert devices > 1
    for model_parallel, tensor in ((-1, devices), (1, 1), (2, 2), (3 * devices, devices), (devices + 1, 1)):
        mesh = local_mesh(model_parallel)
        assert (mesh.shape["tensor"], mesh.shape["data"]) == (tensor, devices // tensor)


def test_a_prompt_is_run_once_for_several_responses(engine, requests, plain_responses, monkeypatch):
    runs = []
    program = scheduler._refill

    def count(static, params, branch, key, prompts, rows):
        runs.append(int(prompts.count.sum()))
        return program(static, params, branch, key, prompts, rows)

    monkeypatch.setattr(scheduler, "_refill", count)
    copies = [request._replace(index=request.index + 1000, temperature=1.0) for request in requests]
    found = responses(engine, [*requests, *copies], rows=8)
    assert {index: tokens for index, tokens in found.items() if index < 1000} == plain_responses
    assert len(runs) < len(requests) + len(copies) // 2
    again = responses(engine, copies[::-1], rows=3)
    assert again == {index: tokens for index, tokens in found.items() if index >= 1000}


@pytest.mark.skipif(not ops.pack_codes.kernels(), reason="no kernel reads codes here")
def test_rows_read_the_weights_as_they_are_stored(tmp_path):
    """As `generate` does: where the codes say something else than the weights beside them, so do the responses."""
    coded, _ = engines(tmp_path)

    def other(weight):
        if not isinstance(weight, Stored):
            return weight
        return weight._replace(codes=jax.tree.map(lambda leaf: -leaf if leaf.dtype in (jnp.float32, jnp.float16) else leaf, weight.codes))

    params = jax.tree.map(other, coded.params, is_leaf=lambda leaf: isinstance(leaf, Stored))
    changed = Engine(coded.model._replace(params=params), coded.decode_config)
    requests = [Request(i, prompt, 0.0, 12) for i, prompt in enumerate([[5, 9, 2], [7, 7, 8, 30, 4]])]
    pacing = RefillConfig(prompt_buckets=(16,), cache_buckets=(32,), chunk=8)

    def texts(engine):
        found = Refiller(engine, sharding.make_mesh(), 2, config=pacing).run(requests, jax.random.key(0))
        return [response.tokens.tolist() for response in sorted(found)]

    alone = changed.generate_ids([request.prompt for request in requests], seeds=[0, 0], max_new_tokens=12, controller=None)
    assert texts(changed) == [text.token_ids for text in alone] != texts(coded)
