"""Exit branches on disk: what is written is what is read, and what does not fit is refused with the values that differ."""

import dataclasses
import hashlib
import json
import os
import pathlib
import warnings

import huggingface_hub
import huggingface_hub.errors as hub_errors
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import eesd_jax
from eesd_jax.decode.controllers import Calibration
from eesd_jax.errors import UserError
from eesd_jax.model import llama, sharding, stored
from eesd_jax.model.config import ModelConfig, RopeConfig
from eesd_jax.model.exit_branch import init_exit_branch
from eesd_jax.weights import branch_folder, hub
from eesd_jax.weights.branch_folder import INFO_NAME, TENSORS_NAME, config_hash, describe, fingerprint, load_branch, save_branch
from eesd_jax.weights.load import load_params
from eesd_jax.weights.publish import publish

CONFIG = tiny.config()
PARAMS = tiny.params(CONFIG)
IDS = np.array([0, 3, 17, 200, 319])
TRAINING = {"steps": 10, "data": ["a", "b"], "loss": 1.5}


def write(folder: pathlib.Path, config: ModelConfig = CONFIG, params: llama.Params = PARAMS, ids: np.ndarray | None = IDS, **about):
    """Writes a branch for a target, and returns both parts of it."""
    branch = init_exit_branch(config, params, 2, "last", ids)
    about = {"exit_layer": 2, "start": "last", "calibration": (1.25, -0.5), "training": TRAINING} | about
    info = describe(config, params, branch, **about)
    save_branch(folder, branch, info)
    return branch, info


def assert_equal(branch, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, branch, expected)
    assert jax.tree.map(lambda leaf: leaf.dtype, branch) == jax.tree.map(lambda leaf: leaf.dtype, expected)


def error_of(folder: pathlib.Path | str, config: ModelConfig = CONFIG, params: llama.Params = PARAMS) -> str:
    """The message of the UserError that loading ends in."""
    with pytest.raises(UserError) as caught:
        load_branch(str(folder), config, params)
    message = str(caught.value)
    assert "\n" not in message
    return message


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# There and back ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ids", [IDS, None], ids=["part", "whole"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_what_is_read_is_what_was_written_to_the_bit(tmp_path, family, ids, dtype):
    config = tiny.config(family)
    params = tiny.params(config, dtype=dtype)
    branch, info = write(tmp_path / "branch", config, params, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_branch(str(tmp_path / "branch"), config, params)
    assert_equal(loaded.branch, branch)
    assert loaded.info == info
    assert load_file(tmp_path / "branch" / TENSORS_NAME)["draft_ids"].dtype == np.int32


def test_a_second_input_is_kept_and_an_exit_at_0_with_it(tmp_path):
    branch = init_exit_branch(CONFIG, PARAMS, 0, "last", IDS, deep_input=True)
    branch = branch._replace(fusion=branch.fusion._replace(norm=branch.fusion.norm * 1.5))
    info = describe(CONFIG, PARAMS, branch, exit_layer=0, start="last", calibration=(1.0, 0.0), training={})
    save_branch(tmp_path, branch, info)
    loaded = load_branch(str(tmp_path), CONFIG, PARAMS)
    assert_equal(loaded.branch, branch)
    assert loaded.info == info


def test_matrices_in_8_bits_are_read_as_what_they_stand_for(tmp_path):
    branch, info = write(tmp_path)
    save_branch(tmp_path, branch, info, in_bytes=True)
    tensors = load_file(tmp_path / TENSORS_NAME)
    assert (tensors["head"].dtype, tensors["head.scale"].dtype, tensors["norm"].dtype) == (np.int8, np.float16, np.float32)
    expected = jax.tree.map(lambda leaf: stored.numbers(stored.rounded(leaf)) if leaf.ndim == 2 else leaf, branch)
    loaded = load_branch(str(tmp_path), CONFIG, PARAMS).branch
    assert_equal(loaded, expected)
    save_branch(tmp_path / "again", loaded, info, in_bytes=True)
    assert contents(tmp_path / "again")[TENSORS_NAME] == (tmp_path / TENSORS_NAME).read_bytes()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"head.scale": None}, ["head is stored as I8", "no head.scale"]),
        ({"head.scale": np.ones((5, 2), np.float16)}, ["head.scale is F16 [5, 2]", "expected F16 [5, 1]"]),
        ({"head.scale": np.ones((5, 1), np.float32)}, ["head.scale is F32 [5, 1]", "expected F16 [5, 1]"]),
    ],
    ids=["missing", "of another size", "of another kind"],
)
def test_codes_without_their_scales_are_refused(tmp_path, change, named):
    branch, info = write(tmp_path)
    save_branch(tmp_path, branch, info, in_bytes=True)
    edit_tensors(**change)(tmp_path)
    message = error_of(tmp_path)
    for text in named:
        assert text in message


def test_the_branch_takes_the_dtype_of_its_target(tmp_path):
    branch, _ = write(tmp_path)
    loaded = load_branch(str(tmp_path), CONFIG, tiny.params(CONFIG, dtype="bfloat16")).branch
    assert_equal(loaded, jax.tree.map(lambda leaf: leaf if leaf.dtype == jnp.int32 else leaf.astype(jnp.bfloat16), branch))


def test_the_branch_goes_where_its_target_is(tmp_path):
    branch, _ = write(tmp_path)
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    params = load_params(CONFIG, tiny.ArraySource(tiny.tensors(CONFIG)), jnp.dtype("float32"), mesh)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the fingerprint is that of one device
        loaded = load_branch(str(tmp_path), CONFIG, params, mesh).branch
    assert_equal(loaded, branch)
    assert loaded.block["wq"].sharding == params["blocks"][0]["wq"].sharding
    assert not loaded.block["wq"].sharding.is_fully_replicated


def test_the_same_branch_gives_the_same_bytes_and_nothing_else(tmp_path):
    mask = os.umask(0o027)
    try:
        for name in ("one", "two"):
            write(tmp_path / "nested" / name)
    finally:
        os.umask(mask)
    one, two = (contents(tmp_path / "nested" / name) for name in ("one", "two"))
    assert one == two
    assert sorted(one) == sorted((TENSORS_NAME, INFO_NAME))
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "nested" / "one").iterdir()} == {0o640}


def test_a_folder_is_replaced_and_other_files_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path, training={})
    _, info = write(tmp_path)
    assert load_branch(str(tmp_path), CONFIG, PARAMS).info == info
    assert sorted(os.listdir(tmp_path)) == sorted((TENSORS_NAME, INFO_NAME, "notes.txt"))


def test_writing_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    write(tmp_path)
    before = contents(tmp_path)

    def full(tensors, path):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(branch_folder, "save_file", full)
    with pytest.raises(UserError, match=r"cannot be written \(.*No space left"):
        write(tmp_path, ids=None)
    assert contents(tmp_path) == before
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / INFO_NAME / "below")


def test_a_crash_between_the_renames_leaves_no_mixture(tmp_path, monkeypatch):
    write(tmp_path)
    replace = pathlib.Path.replace

    def killed(path, target):
        replace(path, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, ids=None)
    assert f"no {INFO_NAME} in this folder" in error_of(tmp_path)
    _, info = write(tmp_path, ids=None)
    assert load_branch(str(tmp_path), CONFIG, PARAMS).info == info


# Refused -----------------------------------------------------------------------------------------------------------------------------


def edit_info(**changes):
    def edit(folder: pathlib.Path) -> None:
        fields = json.loads((folder / INFO_NAME).read_text()) | changes
        (folder / INFO_NAME).write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))

    return edit


def edit_tensors(**changes):
    """Tensors to put in place of others or beside them; None takes one away. `block__wq` is `block.wq`."""

    def edit(folder: pathlib.Path) -> None:
        tensors = load_file(folder / TENSORS_NAME) | {name.replace("__", "."): value for name, value in changes.items()}
        save_file({name: value for name, value in tensors.items() if value is not None}, folder / TENSORS_NAME)

    return edit


def damage(name: str, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


DAMAGES = {
    "no info": (lambda f: (f / INFO_NAME).unlink(), [f"no {INFO_NAME}", "expected an exit branch"]),
    "no tensors": (lambda f: (f / TENSORS_NAME).unlink(), [f"no {TENSORS_NAME}", "expected an exit branch"]),
    "half a file of tensors": (damage(TENSORS_NAME, lambda data: data[: len(data) // 2]), [TENSORS_NAME, "truncated"]),
    "a byte too few": (damage(TENSORS_NAME, lambda data: data[:-1]), [TENSORS_NAME, "truncated"]),
    "empty file of tensors": (damage(TENSORS_NAME, lambda data: b""), [TENSORS_NAME, "truncated"]),
    "half of the info": (damage(INFO_NAME, lambda data: data[: len(data) // 2]), [INFO_NAME, "not valid JSON"]),
    "a list for info": (damage(INFO_NAME, lambda data: b"[]"), [INFO_NAME, "expected a JSON object"]),
    "a model's config": (damage(INFO_NAME, lambda data: json.dumps(tiny.hf_config()).encode()), ["format_version is None", "expected 1"]),
    "a later format": (edit_info(format_version=2), ["format_version is 2", "expected 1"]),
    "a missing field": (edit_info(exit_layer=None), ["exit_layer is None", "expected an integer >= 0"]),
    "a text for a number": (edit_info(exit_layer="2"), ["exit_layer is '2'", "expected an integer >= 0"]),
    "true for a number": (edit_info(draft_vocab_size=True), ["draft_vocab_size is True", "expected an integer >= 1"]),
    "no exit": (edit_info(exit_layer=0), ["exit_layer is 0", "expected 1 to"]),
    "a slope that is not finite": (edit_info(calibration_slope=float("nan")), ["calibration_slope is nan", "expected a finite number"]),
    "a number for provenance": (edit_info(training=3), ["training is 3", "expected an object"]),
    "exit behind the last block": (edit_info(exit_layer=3), ["exit_layer is 3", "expected 1 to 2 for a model of 3 blocks"]),
    "another hidden size": (edit_info(hidden_size=48), ["hidden_size 48", "the model's is 32"]),
    "another vocabulary": (edit_info(vocab_size=400), ["vocab_size 400", "the model's is 320"]),
    "another draft vocabulary": (edit_info(draft_vocab_size=6), ["tensor head", "[5, 32]", "expected [6, 32]"]),
    "a missing tensor": (edit_tensors(block__wq=None), ["missing: block.wq"]),
    "an unexpected tensor": (edit_tensors(block__bq=np.zeros(32, np.float32)), ["not expected: block.bq"]),
    "another block": (edit_tensors(block__wk=np.zeros((8, 32), np.float32)), ["tensor block.wk", "[8, 32]", "expected [16, 32]"]),
    "whole numbers for weights": (edit_tensors(norm=np.zeros(32, np.int32)), ["tensor norm", "I32", "F32 or F16 or BF16"]),
    "numbers for ids": (edit_tensors(draft_ids=IDS.astype(np.float32)), ["tensor draft_ids", "F32", "I32"]),
    "ids out of order": (edit_tensors(draft_ids=np.array([0, 17, 3, 200, 319], np.int32)), ["id 3 behind id 17", "expected increasing"]),
    "an id twice": (edit_tensors(draft_ids=np.array([0, 3, 3, 200, 319], np.int32)), ["id 3 behind id 3", "expected increasing"]),
    "an id behind the vocabulary": (edit_tensors(draft_ids=np.array([0, 3, 17, 200, 320], np.int32)), ["id 320", "from 0 to 319"]),
    "an id before it": (edit_tensors(draft_ids=np.array([-1, 3, 17, 200, 319], np.int32)), ["id -1", "from 0 to 319"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders_are_refused(tmp_path, name):
    damage, named = DAMAGES[name]
    write(tmp_path)
    damage(tmp_path)
    message = error_of(tmp_path)
    for text in (str(tmp_path), *named):
        assert text in message


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"hidden_size": 64}, ["hidden_size 32", "the model's is 64"]),
        ({"vocab_size": 640}, ["vocab_size 320", "the model's is 640"]),
        ({"num_hidden_layers": 2}, ["exit_layer is 2", "expected 1 to 1 for a model of 2 blocks"]),
        ({"intermediate_size": 96}, ["tensor block.w_", "64", "96"]),
        ({"num_key_value_heads": 1}, ["tensor block.wk", "[16, 32]", "expected [8, 32]"]),
        ({"attention_bias": True}, ["missing: block.bk, block.bo, block.bq, block.bv"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_branches_of_models_of_another_shape_are_refused(tmp_path, overrides, named):
    write(tmp_path)
    other = tiny.config(**overrides)
    message = error_of(tmp_path, other, tiny.params(other))
    for text in named:
        assert text in message


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("", ["exit branch ''", "no such folder"]),
        ("/no/such/folder", ["exit branch '/no/such/folder'", "no such folder"]),
        ("./nothing", ["exit branch './nothing'", "no such folder"]),
        ("no/such/branch", ["exit branch 'no/such/branch'", "no such folder"]),
        (__file__, ["is a file"]),
        ("bad//id", ["exit branch 'bad//id'"]),
        ("me/unknown", ["exit branch 'me/unknown'", "could not be fetched"]),
    ],
)
def test_names_that_name_nothing(name, named):
    message = error_of(name)
    for text in (*named, "expected auto, none, a folder"):
        assert text in message


# Hubs --------------------------------------------------------------------------------------------------------------------------------


def test_a_branch_from_a_hub(tmp_path, monkeypatch):
    branch, info = write(tmp_path)
    asked = []

    def snapshot_download(name, *, allow_patterns, ignore_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    loaded = load_branch("me/branch", CONFIG, PARAMS)
    assert asked == [("me/branch", [TENSORS_NAME, INFO_NAME])]
    assert_equal(loaded.branch, branch)
    assert loaded.info == info


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (hub_errors.RepositoryNotFoundError, "exit branch 'me/branch' is unknown"),
        (hub_errors.GatedRepoError, "exit branch 'me/branch' is gated: .* HF_TOKEN"),
    ],
)
def test_a_hub_that_has_no_such_branch(monkeypatch, kind, named):
    def snapshot_download(*args, **kwargs):
        raise kind.__new__(kind)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=named):
        load_branch("me/branch", CONFIG, PARAMS)


def test_a_published_folder_is_a_branch_with_a_model_card(tmp_path):
    branch, info = write(tmp_path / "trained")
    card_of = {"name": "me/tiny-eesd", "base_model": "you/tiny: a model", "license": "apache-2.0"}
    publish(tmp_path / "trained", tmp_path / "upload", **card_of, measured={"tokens per round": 1.9})
    loaded = load_branch(str(tmp_path / "upload"), CONFIG, PARAMS)
    assert_equal(loaded.branch, branch)
    assert loaded.info == info
    assert sorted(os.listdir(tmp_path / "upload")) == sorted((TENSORS_NAME, INFO_NAME, "README.md"))
    card = huggingface_hub.ModelCard.load(tmp_path / "upload" / "README.md")
    front = card.data.to_dict()
    assert (front["base_model"], front["license"], front["library_name"]) == ("you/tiny: a model", "apache-2.0", "eesd-jax")
    assert "speculative-decoding" in front["tags"]
    assert card.text.lstrip().startswith("# tiny-eesd\n")
    for text in ("--exit_branch=me/tiny-eesd", "| tokens per round | 1.9 |", json.dumps(TRAINING, indent=2), "5 of 320 tokens"):
        assert text in card.text
    # Without new measurements, and in place.
    publish(tmp_path / "upload", tmp_path / "upload", **card_of)
    assert "Not measured." in (tmp_path / "upload" / "README.md").read_text()
    assert_equal(load_branch(str(tmp_path / "upload"), CONFIG, PARAMS).branch, branch)


def test_what_is_no_branch_is_not_published(tmp_path):
    with pytest.raises(UserError, match=f"no {TENSORS_NAME} in this folder"):
        publish(tmp_path, tmp_path / "upload", name="a", base_model="b", license="c")
    assert os.listdir(tmp_path) == []


# Which target ------------------------------------------------------------------------------------------------------------------------


def test_fingerprint_is_of_names_shapes_and_the_first_values():
    digest = hashlib.sha256()
    paths = [*(("blocks", i, name) for i in range(3) for name in sorted(PARAMS["blocks"][i])), ("embed",), ("final_norm",), ("lm_head",)]
    for path in paths:
        leaf = PARAMS
        for step in path:
            leaf = leaf[step]
        digest.update(f"{'/'.join(map(str, path))} {leaf.shape}\n".encode())
        digest.update(np.asarray(leaf).ravel()[:64].astype(ml_dtypes.bfloat16).tobytes())
    assert fingerprint(PARAMS) == digest.hexdigest()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_fingerprint_tells_weights_apart_but_not_dtypes_or_devices(family):
    config = tiny.config(family)
    ours = fingerprint(tiny.params(config))
    assert fingerprint(tiny.params(config, dtype="bfloat16")) == ours
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    assert fingerprint(load_params(config, tiny.ArraySource(tiny.tensors(config)), jnp.dtype("float32"), mesh)) == ours
    assert fingerprint(tiny.params(config, seed=1)) != ours
    params = tiny.params(config)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        changed = jax.tree_util.tree_map_with_path(lambda at, x, path=path: x.at[(0,) * x.ndim].add(1.0) if at == path else x, params)
        assert fingerprint(changed) != ours, (path, leaf.shape)


def test_config_hash_tells_apart_what_computes_differently():
    def changed(**changes) -> str:
        return config_hash(dataclasses.replace(CONFIG, **changes))

    ours = config_hash(CONFIG)
    assert changed(architecture="mistral", context_length=7) == ours  # a name, and how far it goes
    assert changed(norm_eps=float(np.float32(CONFIG.norm_eps))) == ours  # as a GGUF file has it
    others = [
        changed(norm_eps=1e-6),
        changed(rope=RopeConfig(theta=5000.0)),
        changed(windows=(None, None, 5)),
        changed(qk_norm=True),
        changed(num_layers=4),
        changed(tie_embeddings=True),
    ]
    assert len({ours, *others}) == len(others) + 1


def test_other_weights_are_warned_of(tmp_path):
    branch, info = write(tmp_path)
    others = tiny.params(CONFIG, seed=1)
    with pytest.warns(UserWarning, match="made for another model") as caught:
        loaded = load_branch(str(tmp_path), CONFIG, others)
    (message,) = (str(warning.message) for warning in caught)
    assert info.target_fingerprint[:12] in message
    assert fingerprint(others)[:12] in message
    assert "config hash" not in message
    assert "\n" not in message
    assert_equal(loaded.branch, branch)


def test_another_meaning_of_the_same_shapes_is_warned_of(tmp_path):
    write(tmp_path)
    other = tiny.config(rope_theta=5000.0)
    with pytest.warns(UserWarning, match=f"config hash is {config_hash(CONFIG)[:12]}, this model's {config_hash(other)[:12]}"):
        load_branch(str(tmp_path), other, PARAMS)


# `eesd_jax.load` ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny.write_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", tiny.hf_config()))


def test_load_takes_a_branch_of_a_folder(tmp_path, model):
    branch, info = write(tmp_path)
    drafter = eesd_jax.load(model, exit_branch=str(tmp_path), max_draft=3).drafter
    assert_equal(drafter.branch, branch)
    assert (drafter.draft.exit_layer, drafter.draft.max_draft) == (2, 3)
    assert drafter.calibration == Calibration(info.calibration_slope, info.calibration_intercept)
    assert drafter.trained
    write(tmp_path, training={})
    assert not eesd_jax.load(model, exit_branch=str(tmp_path)).drafter.trained


def test_load_without_a_branch(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert eesd_jax.load(model, exit_branch="none").drafter.branch is None
        assert eesd_jax.load(model, arms=["lookup"]).drafter.branch is None
        assert eesd_jax.load(model, exit_branch="none", arms=["exit"]).drafter is None
    with pytest.warns(UserWarning, match="no exit branch comes with model .*tiny.gguf': drafts come from lookup alone"):
        drafter = eesd_jax.load(model).drafter
    assert drafter.branch is None
    assert drafter.draft.longest_match > 0
    with pytest.warns(UserWarning, match="no exit branch comes with model .*tiny.gguf': decoding will be plain"):
        assert eesd_jax.load(model, arms=["exit"]).drafter is None


def test_a_wrong_branch_is_refused_before_the_model_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(eesd_jax.engine.engine, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match="no such folder"):
        eesd_jax.load(exit_branch="/no/such/folder")
    write(tmp_path)
    damage(TENSORS_NAME, lambda data: data[:-1])(tmp_path)
    with pytest.raises(UserError, match="truncated"):
        eesd_jax.load(exit_branch=str(tmp_path))
    with pytest.raises(UserError, match="max_draft is 0; expected an integer >= 1"):
        eesd_jax.load(max_draft=0)
    with pytest.raises(UserError, match="candidates is 0; expected an integer >= 1"):
        eesd_jax.load(candidates=0)
    with pytest.raises(UserError, match="candidates is 2, and there is no exit branch to draw them; expected 1"):
        eesd_jax.load(candidates=2, arms=["lookup"])


def test_auto_takes_the_branch_that_this_package_carries(tmp_path, monkeypatch):
    monkeypatch.setattr(branch_folder, "SHIPPED", tmp_path)
    monkeypatch.setattr(eesd_jax.engine.engine, "load_model", lambda *_: tiny.loaded_model())
    branch, _ = write(tmp_path / "you--tiny")
    assert_equal(eesd_jax.load("you/tiny").drafter.branch, branch)
    with pytest.warns(UserWarning, match="'you/other': drafts come from lookup alone"):
        assert eesd_jax.load("you/other").drafter.branch is None


def test_auto_leaves_the_branch_out_beside_lookup_where_weights_are_codes(tmp_path, monkeypatch):
    monkeypatch.setattr(branch_folder, "SHIPPED", tmp_path)
    target = tiny.loaded_model()
    embed = target.params["embed"]
    coded = target._replace(params=target.params | {"embed": stored.Stored(embed, stored.rounded(embed))})
    monkeypatch.setattr(eesd_jax.engine.engine, "load_model", lambda *_: coded)
    branch, _ = write(tmp_path / "you--tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = eesd_jax.load("you/tiny").drafter
    assert alone.branch is None and alone.has_lookup
    for wanted in ({"arms": ["exit"]}, {"candidates": 2}, {"exit_branch": "you/tiny"}):
        assert_equal(eesd_jax.load("you/tiny", **wanted).drafter.branch, branch)
