"""What the library is given is checked before anything of it reaches a jitted program: the message names place and value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import eesd_jax
from eesd_jax import DecodeConfig, Engine, SamplingConfig, UserError
from eesd_jax.config import DraftConfig, parse_arms
from eesd_jax.decode.controllers import Calibration
from eesd_jax.engine import engine as front
from eesd_jax.engine.drafter import Drafter
from eesd_jax.model import sharding
from eesd_jax.model.exit_branch import init_exit_branch

CONTEXT = tiny.hf_config()["max_position_embeddings"]
BUCKETS = DecodeConfig(max_new_tokens=4, prompt_buckets=(16,), min_capacity=32)
USER = {"role": "user", "content": "hello"}


@pytest.fixture(scope="module")
def lm() -> Engine:
    return Engine(tiny.loaded_model()._replace(eos_ids=()), BUCKETS)


@pytest.fixture
def no_program(monkeypatch):
    """Nothing may come as far as to a program."""

    def refuse(*args, **kwargs):
        raise AssertionError("a program was run")

    for name in ("_prefill", "_decode_plain", "_decode_speculative"):
        monkeypatch.setattr(front, name, refuse)


def message(call, *words: str) -> str:
    """The message of the UserError that a call ends with: one line that has these words."""
    with pytest.raises(UserError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    for word in words:
        assert word in text, text
    return text


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([[5, 99999]], ("prompts[0][1] is 99999", f"0 to {tiny.VOCAB_SIZE - 1}")),
        ([[5], [7, tiny.VOCAB_SIZE]], (f"prompts[1][1] is {tiny.VOCAB_SIZE}",)),
        ([[5, -1]], ("prompts[0][1] is -1",)),
        ([[2**40]], (f"prompts[0][0] is {2**40}",)),
        ([[5.0]], ("prompts[0][0] is 5.0", "token id")),
        ([[5, None]], ("prompts[0][1] is None",)),
        ([["5"]], ("prompts[0][0] is '5'",)),
        ([[True]], ("prompts[0][0] is True",)),
        ([[[5]]], ("prompts[0][0] is [5]",)),
        (np.array([[5.0, 1.0]]), ("prompts[0][0] is", "token id")),
        (np.array([[5, 400]]), ("prompts[0][1] is 400",)),
        ([[5], []], ("prompts[1] is []", "at least one token")),
        ([5, 9], ("prompts[0] is 5", "a row of token ids")),
        (["text"], ("prompts[0] is 'text'", "a row of token ids", "generate_batch")),
        ("text", ("prompts is 'text'",)),
        (b"text", ("prompts is b'text'",)),
        (None, ("prompts is None",)),
        (7, ("prompts is 7",)),
        ({"a": [5]}, ("prompts is {'a': [5]}",)),
        ([[5] * CONTEXT], (f"prompts[0] has {CONTEXT} tokens", f"context is {CONTEXT}")),
        ([[5], [5] * 10_000], ("prompts[1] has 10000 tokens",)),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_token_ids_are_checked(lm, no_program, prompts, words):
    seeds = range(len(prompts)) if hasattr(prompts, "__len__") else [0]
    message(lambda: lm.generate_ids(prompts, seeds=seeds), *words)


def test_the_steps_below_are_guarded_too(lm, no_program):
    message(lambda: lm.prefill([[5, 99999]], [0], 1, 4), "prompts[0][1] is 99999")
    message(lambda: lm.prefill([[5]], [0], 1, 0), "max_new_tokens is 0")


@pytest.mark.parametrize(
    ("seeds", "words"),
    [
        ([1.5], ("seeds[0] is 1.5", "an integer")),
        (["7"], ("seeds[0] is '7'",)),
        ([None], ("seeds[0] is None",)),
        ("7", ("seeds is '7'",)),
        (7, ("seeds is 7",)),
        (None, ("seeds is None",)),
        ([], ("0 seeds for 1 prompts",)),
        ([1, 2], ("2 seeds for 1 prompts",)),
    ],
    ids=repr,
)
def test_seeds_are_checked(lm, no_program, seeds, words):
    message(lambda: lm.generate_ids([[5]], seeds=seeds), *words)


def test_a_single_seed_is_named_as_such(lm, no_program):
    for seed in (1.5, "7", [7], True):
        message(lambda seed=seed: lm.generate("hello", seed=seed), "seed is", "an integer")
        message(lambda seed=seed: lm.stream("hello", seed=seed), "seed is", "an integer")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, ("max_new_tokens is 0", ">= 1")),
        ({"max_new_tokens": -3}, ("max_new_tokens is -3",)),
        ({"max_new_tokens": 2.5}, ("max_new_tokens is 2.5",)),
        ({"max_new_tokens": "8"}, ("max_new_tokens is '8'",)),
        ({"max_new_tokens": True}, ("max_new_tokens is True",)),
        ({"batch_size": 0}, ("batch_size is 0", ">= 1")),
        ({"batch_size": -2}, ("batch_size is -2",)),
        ({"batch_size": 1.0}, ("batch_size is 1.0",)),
        ({"stop": 5}, ("stop is 5", "texts")),
        ({"stop": [5]}, ("stop[0] is 5", "a text")),
        ({"stop": ["a", None]}, ("stop[1] is None",)),
        ({"stop": ["a", ""]}, ("stop[1] is ''",)),
        ({"stop": ""}, ("stop is ''",)),
        ({"stop": b"a"}, ("stop is b'a'",)),
        ({"stop": {"a": 1}}, ("stop is {'a': 1}",)),
        ({"sampling": {"temperature": 0.7}}, ("sampling is {'temperature': 0.7}", "SamplingConfig(temperature=0.7)")),
        ({"sampling": None}, ("sampling is None", "SamplingConfig")),
        ({"sampling": 0.7}, ("sampling is 0.7", "SamplingConfig")),
        ({"sampling": SamplingConfig}, ("SamplingConfig", "expected")),
        ({"temperature": -1}, ("temperature is -1",)),
        ({"temperature": "hot"}, ("temperature is 'hot'", "a finite number")),
        ({"temperature": [0.5, 0.7]}, ("temperature is [0.5, 0.7]",)),
        ({"top_k": 2.5}, ("top_k is 2.5", "an integer")),
        ({"top_k": None}, ("top_k is None",)),
        ({"top_p": None}, ("top_p is None",)),
        ({"top_p": float("nan")}, ("top_p is nan",)),
        ({"min_p": "0.1"}, ("min_p is '0.1'",)),
        ({"temprature": 0.7}, ("temprature", "temperature")),
        ({"max_tokens": 7}, ("max_tokens", "max_new_tokens")),
        ({"do_sample": True}, ("do_sample",)),
        ({"controller": 4}, ("controller is 4", "plain")),
        ({"controller": "fixed"}, ("controller 'fixed'",)),
        ({"controller": Calibration}, ("controller is", "expected")),
        ({"controller": Calibration()}, ("controller is", "expected")),
    ],
    ids=repr,
)
def test_options_are_checked(lm, no_program, options, words):
    message(lambda: lm.generate_ids([[5]], seeds=[0], **options), *words)
    message(lambda: lm.generate("hello", **options), *words)
    message(lambda: lm.generate_batch(["hello"], **options), *words)
    # At the call, not when the first piece is asked for.
    message(lambda: lm.stream("hello", **options), *words)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (None, ("prompt is None",)),
        (5, ("prompt is 5",)),
        (b"hi", ("prompt is b'hi'",)),
        ([], ("prompt is []", "message")),
        (USER, ("prompt is", "a list")),
        ([5, 7], ("prompt[0] is 5", "generate_ids")),
        (["hi"], ("prompt[0] is 'hi'",)),
        ([{"role": "user"}], ("prompt[0] is {'role': 'user'}", "content")),
        ([{"content": "hi"}], ("prompt[0] is", "role")),
        ([USER, {"role": "user", "content": None}], ("prompt[1] is", "content")),
        ([{"role": 1, "content": "hi"}], ("prompt[0] is", "role")),
        ([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], ("prompt[0] is", "content")),
        ("half \ud83d", ("half \\ud83d", "UTF-8")),
        ([{"role": "user", "content": "half \udcff"}], ("half \\udcff", "UTF-8")),
        ([{"role": "us\ud83der", "content": "hi"}], ("\\ud83d", "UTF-8")),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_prompts_are_checked(lm, no_program, prompt, words):
    message(lambda: lm.encode(prompt), *words)
    message(lambda: lm.generate(prompt), *words)
    message(lambda: lm.stream(prompt), *words)
    message(lambda: lm.encode(prompt, chat=False), *words)


def test_the_row_of_a_batch_is_named(lm, no_program):
    message(lambda: lm.generate_batch(["a", "half \ud83d"]), "prompts[1]", "half \\ud83d")
    message(lambda: lm.generate_batch(["a", [USER, {"role": "user"}]]), "prompts[1][1]", "content")
    message(lambda: lm.generate_batch(["a", "hello " * CONTEXT]), "prompts[1]", f"context is {CONTEXT}")
    message(lambda: lm.generate_batch([["a"]]), "prompts[0][0] is 'a'")
    message(lambda: lm.generate_batch(5), "prompts is 5")
    message(lambda: lm.generate_batch(None), "prompts is None")


def test_an_id_that_the_tokenizer_has_and_the_model_has_not_is_refused_when_it_occurs(no_program):
    lm = Engine(tiny.loaded_model(vocab_size=299), BUCKETS)  # the tokenizer has 300
    token = lm.model.tokenizer.convert_ids_to_tokens(299)
    text = lm.model.tokenizer.convert_tokens_to_string([token])
    ids = lm.model.tokenizer(text).input_ids
    assert 299 in ids, (token, ids)
    message(lambda: lm.generate(text, chat=False), "is 299", "0 to 298")


def test_a_string_is_one_where_several_are_expected(lm):
    text = lm.generate("hello", max_new_tokens=30).text
    stop = text[5:8]
    assert lm.generate("hello", max_new_tokens=30, stop=stop).text == text[: text.index(stop)]
    one = lm.generate("hello", max_new_tokens=30, stop=[stop])
    for several in ((stop,), {stop}, iter([stop]), np.array([stop])):
        assert lm.generate("hello", max_new_tokens=30, stop=several).token_ids == one.token_ids
    assert lm.generate("hello", max_new_tokens=30, stop=None).text == text
    assert "".join(lm.stream("hello", max_new_tokens=30, stop=stop)) == one.text
    # One prompt, not a prompt a letter.
    (alone,) = lm.generate_batch("hello")
    assert alone.token_ids == lm.generate("hello").token_ids
    (alone,) = lm.generate_batch([USER])
    assert alone.token_ids == lm.generate([USER]).token_ids


def test_arms_as_a_text():
    assert parse_arms("exit") == parse_arms(["exit"]) == ("exit",)
    assert parse_arms("lookup,exit") == parse_arms(" exit , lookup ") == ("exit", "lookup")
    for wrong in ("", "e", [], None, 5, [5], ["exit", None], [["exit"]], "branch"):
        message(lambda wrong=wrong: parse_arms(wrong), "exit, lookup")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arms": "branch"}, ("branch", "exit, lookup")),
        ({"arms": None}, ("None", "exit, lookup")),
        ({"dtype": "float16"}, ("dtype is 'float16'",)),
        ({"dtype": 32}, ("dtype is 32",)),
        ({"max_draft": 0}, ("max_draft is 0",)),
        ({"max_draft": 2.5}, ("max_draft is 2.5",)),
        ({"max_draft": "4"}, ("max_draft is '4'",)),
        ({"candidates": None}, ("candidates is None",)),
        ({"quantize": "int2"}, ("quantize is 'int2'",)),
        ({"quantize": 8}, ("quantize is 8",)),
        ({"exit_branch": 5}, ("exit_branch is 5",)),
        ({"ngrams": 5}, ("ngrams is 5",)),
        ({"mesh": "tensor:2"}, ("mesh is 'tensor:2'", "make_mesh")),
        ({"mesh": {"tensor": 2}}, ("mesh is", "make_mesh")),
        ({"decode_config": {"max_new_tokens": 5}}, ("decode_config is", "DecodeConfig")),
    ],
    ids=repr,
)
def test_what_load_is_given_is_checked_before_the_model_is_looked_for(monkeypatch, options, words):
    monkeypatch.setattr(front, "load_model", lambda *args: pytest.fail("the model was loaded"))
    message(lambda: eesd_jax.load("tiny", **options), *words)


@pytest.mark.parametrize("model", [None, 5, b"demo", ["demo"]])
def test_a_model_is_a_name_or_a_path(model):
    message(lambda: eesd_jax.load(model), "model is", "expected")


def test_names_may_be_paths(tmp_path):
    folder = tiny.write_folder(tmp_path / "model", tiny.hf_config(), with_tokenizer=True)
    assert eesd_jax.load(folder, exit_branch=None, ngrams=None, dtype=jnp.float32).drafter is not None


def test_a_mesh_must_be_one_of_ours(monkeypatch):
    monkeypatch.setattr(front, "load_model", lambda *args: pytest.fail("the model was loaded"))
    devices = np.array(jax.devices()[:1])
    message(
        lambda: eesd_jax.load("tiny", mesh=jax.sharding.Mesh(devices, ("x",))), "mesh has the axes x", "data, fsdp, tensor", "make_mesh"
    )
    explicit = jax.make_mesh((1, 1, 1), sharding.MESH_AXES, axis_types=(jax.sharding.AxisType.Explicit,) * 3)
    message(lambda: eesd_jax.load("tiny", mesh=explicit), "Explicit", "make_mesh")


def test_what_drafts_must_lie_where_the_model_does():
    if len(jax.devices()) < 2:
        pytest.skip("one device")
    model = tiny.loaded_model()
    branch = init_exit_branch(model.config, model.params, 1, "next")
    elsewhere = jax.device_put(branch, jax.devices()[1])
    drafter = Drafter(elsewhere, DraftConfig(1, 2), Calibration(), trained=False)
    message(lambda: Engine(model, BUCKETS, drafter), "exit branch", "devices")


def test_no_prompts_give_no_texts(lm, no_program):
    assert lm.generate_batch([]) == []
    assert lm.generate_batch((), seeds=[]) == []
    assert lm.generate_ids([], seeds=[]) == []
    assert lm.generate_ids(np.zeros((0, 4), np.int32), seeds=[]) == []
    assert lm.generate_batch([], batch_size=4, stop="x") == []
    message(lambda: lm.generate_ids([], seeds=[1]), "1 seeds for 0 prompts")
    message(lambda: lm.generate_batch([], max_new_tokens=0), "max_new_tokens is 0")


def test_whatever_counts_as_an_integer_or_a_number_is_taken(lm):
    expected = lm.generate_ids([[5, 9]], seeds=[3], max_new_tokens=4)[0].token_ids
    for prompts in (
        np.array([[5, 9]], np.int64),
        jnp.array([[5, 9]]),
        [np.array([5, 9], np.uint8)],
        ((5, 9),),
        [range(5, 10, 4)],
        iter([[5, 9]]),
    ):
        found = lm.generate_ids(prompts, seeds=np.array([3]), max_new_tokens=np.int64(4))
        assert found[0].token_ids == expected
    sampling = SamplingConfig(np.float32(0.5), np.int64(3), np.float64(0.5), 0)
    assert sampling == SamplingConfig(0.5, 3, 0.5, 0.0)
    assert hash(sampling) == hash(SamplingConfig(0.5, 3, 0.5, 0.0))


def test_seeds_of_any_size(lm):
    options = {"sampling": SamplingConfig(temperature=1.0), "max_new_tokens": 8}
    texts = {seed: lm.generate_ids([[5]], seeds=[seed], **options)[0].token_ids for seed in (0, -1, 2**32, 2**40, -(2**40), 2**64 + 1)}
    assert len({tuple(text) for text in texts.values()}) == len(texts)


def test_keywords_of_sampling_are_taken_as_such(lm):
    sampling = SamplingConfig(temperature=0.8, top_k=20)
    expected = lm.generate("hello", sampling=sampling, seed=1)
    assert lm.generate("hello", temperature=0.8, top_k=20, seed=1).token_ids == expected.token_ids
    assert lm.generate("hello", sampling=SamplingConfig(temperature=0.8), top_k=20, seed=1).token_ids == expected.token_ids
    assert "".join(lm.stream("hello", temperature=0.8, top_k=20, seed=1)) == expected.text
    batch = lm.generate_batch(["hello", "x"], temperature=0.8, top_k=20, seeds=[1, 2])
    assert batch[0].token_ids == expected.token_ids


@pytest.mark.parametrize(
    "options", [{"temperature": 1e-45}, {"temperature": 1e-39}, {"temperature": 1e-300}, {"temperature": 0.7, "top_p": 1e-300}], ids=repr
)
def test_numbers_too_small_for_float32_are_greedy(lm, options):
    """Not the end of the text, nor any token with the same chance."""
    assert lm.generate("hello", **options).token_ids == lm.generate("hello").token_ids


@pytest.mark.parametrize(
    "options", [{"temperature": 1e300}, {"temperature": 1.0, "top_k": 2**40}, {"temperature": 1.0, "min_p": 1 - 1e-12}]
)
def test_numbers_too_large_for_the_programs_do_what_they_say(lm, options):
    assert len(lm.generate("hello", **options).token_ids) == BUCKETS.max_new_tokens


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"batch_size": 0},
        {"seed": 0.5},
        {"prompt_buckets": ()},
        {"prompt_buckets": (64, 32)},
        {"prompt_buckets": (0, 32)},
        {"prompt_buckets": "64"},
        {"prompt_buckets": 64},
        {"min_capacity": 0},
        {"chunk": 0},
        {"stream_chunk": -1},
    ],
    ids=repr,
)
def test_a_decode_config_that_could_not_be_run_is_refused(options):
    (name, value), *_ = options.items()
    message(lambda: DecodeConfig(**options), f"{name} is {value!r}")


def test_lists_are_taken_as_buckets():
    assert DecodeConfig(prompt_buckets=[16, 32]).prompt_buckets == (16, 32)
    hash(DecodeConfig(prompt_buckets=[16, 32]))
