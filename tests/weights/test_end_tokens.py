"""A text ends with every token that the model's files name as an end, by any of their ways, and the token is not printed."""

import dataclasses
import json
from unittest.mock import ANY

import pytest
import tiny
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from eesd_jax import DecodeConfig, Engine, UserError
from eesd_jax.weights.end_tokens import NAMES, end_ids
from eesd_jax.weights.load import load_text

PROMPT = [50, 60, 70]
ODD_TEMPLATE = (
    "{% for m in messages %}{{ '<|in|>' if m.role == 'user' else '<|out|>' }}{{ m.content | trim }}{% if m.role == 'assistant' %}\n<|fin|>"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|out|>{% endif %}"
)


def tokenizer_with(*names: str, special: bool = True, template: str | None = None, **fields) -> PreTrainedTokenizerFast:
    """Bytes and these tokens, from id 256 on, of which none ends a text by what the tokenizer states."""
    core = Tokenizer.from_str(json.dumps(json.loads(tiny.tokenizer().backend_tokenizer.to_str()) | {"added_tokens": []}))
    tokens = [AddedToken(name, normalized=False, special=special) for name in names]
    (core.add_special_tokens if special else core.add_tokens)(tokens)
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **fields)


def ends(tokenizer: PreTrainedTokenizerFast, *stated) -> list[str]:
    """Their names, but for those that every tokenizer of this file has."""
    always = end_ids(tokenizer_with(), (), 320)
    return tokenizer.convert_ids_to_tokens([i for i in end_ids(tokenizer, stated, 320) if i not in always])


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    "name", ["<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>", "<EOT>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "</s>"]
)
def test_tokens_that_end_every_text_are_known_by_name(name, special):
    assert ends(tokenizer_with("<|x|>", name, special=special)) == [name]


def test_the_token_that_the_chat_template_writes_after_an_answer_is_one():
    assert ends(tokenizer_with("<|in|>", "<|out|>", "<|fin|>", template=ODD_TEMPLATE)) == ["<|fin|>"]
    assert ends(tokenizer_with("<|fin|>", template="{{ raise_exception('no') }}")) == []
    assert ends(tokenizer_with("<|fin|>", template="{% for m in messages %}{{ m.content }}\n{% endfor %}")) == []
    assert ends(tokenizer_with("<|fin|>", template="<|fin|>")) == []


def test_what_the_files_state_counts():
    tokenizer = tokenizer_with("<|x|>", "<|y|>", "<|z|>", eos_token="<|z|>")
    x, y = tokenizer.convert_tokens_to_ids(["<|x|>", "<|y|>"])
    assert ends(tokenizer, x, y) == ["<|x|>", "<|y|>", "<|z|>"]
    assert ends(tokenizer, -1, 320, 2**32 - 1) == ["<|z|>"]
    assert ends(tokenizer_with("<|x|>", eot_token="<|x|>")) == ["<|x|>"]


def test_an_ordinary_piece_with_the_name_of_a_sentence_end_is_none():
    state = json.loads(tokenizer_with().backend_tokenizer.to_str())
    state["model"]["vocab"]["</s>"] = len(state["model"]["vocab"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    assert ends(tokenizer) == []


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        ({"config": 5}, {5}),
        ({"config": [5, 6]}, {5, 6}),
        ({"config": None, "generation_config": [7]}, {7}),
        ({"config": 5, "generation_config": 7}, {5, 7}),
        ({"config": -1, "generation_config": [9, 100_000]}, {9}),
        ({"config": []}, set()),
    ],
    ids=str,
)
def test_ends_of_a_folder(tmp_path, configs, expected):
    folder = tiny.write_folder(tmp_path / "model", tiny.hf_config(eos_token_id=configs["config"]), with_tokenizer=True)
    if "generation_config" in configs:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": configs["generation_config"]}))
    assert set(load_text(str(folder)).eos_ids) == expected | {0, 2}


def test_a_folder_whose_end_is_no_id_is_refused(tmp_path):
    folder = tiny.write_folder(tmp_path / "model", tiny.hf_config(eos_token_id="<|im_end|>"), with_tokenizer=True)
    with pytest.raises(UserError, match="eos_token_id"):
        load_text(str(folder))


@pytest.mark.parametrize("kind", [1, 3, 4], ids=["normal", "control", "user's"])
@pytest.mark.parametrize("stated", [0, None, 2**32 - 1])
def test_ends_of_a_gguf_file_that_states_another(tmp_path, stated, kind):
    """Whatever kind of token the file calls the end of turns."""
    types = tiny.gguf_tokenizer(tiny.tokenizer())["tokenizer.ggml.token_type"]
    types[2] = kind
    fields = {"tokenizer.ggml.eos_token_id": stated, "tokenizer.ggml.token_type": types}
    file = tiny.write_gguf(tmp_path / "model.gguf", tiny.hf_config(), fields=fields)
    text = load_text(str(file))
    assert set(text.eos_ids) == {0, 2}
    assert text.tokenizer("a<|im_end|>b").input_ids[1] == 2
    assert text.tokenizer.decode([2], skip_special_tokens=True) == ""


@pytest.mark.parametrize("name", ["eot", "eom"])
def test_further_ends_of_a_gguf_file(tmp_path, name):
    file = tiny.write_gguf(tmp_path / "model.gguf", tiny.hf_config(), fields={f"tokenizer.ggml.{name}_token_id": 9})
    assert 9 in load_text(str(file)).eos_ids


def named(model, token_id: int, name: str, special: bool):
    """A model whose token of that id has that name."""
    state = json.loads(model.tokenizer.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    old = next(token for token, i in vocab.items() if i == token_id)
    state["model"]["vocab"] = {name if i == token_id else token: i for token, i in vocab.items()}
    state["model"]["merges"] = [merge for merge in state["model"]["merges"] if old not in (*merge, "".join(merge))]
    core = Tokenizer.from_str(json.dumps(state))
    (core.add_special_tokens if special else core.add_tokens)([AddedToken(name, normalized=False, special=special)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=tiny.CHAT_TEMPLATE)
    return model._replace(tokenizer=tokenizer, eos_ids=end_ids(tokenizer, (), model.config.vocab_size))


@pytest.fixture(scope="module")
def endless():
    """A model, the tokens that it writes, and the place of one that occurs there first, behind at least three."""
    model = tiny.loaded_model()._replace(eos_ids=())
    tokens = Engine(model, DecodeConfig(prompt_buckets=(16,))).generate_ids([PROMPT], seeds=[0], max_new_tokens=12)[0].token_ids
    place = next(i for i in range(3, 12) if tokens.index(tokens[i]) == i and 2 < tokens[i] < 300)
    return model, tokens, place


@pytest.mark.parametrize("special", [True, False])
def test_a_text_ends_with_the_token_of_that_name_and_does_not_print_it(endless, special):
    model, tokens, place = endless
    lm = Engine(named(model, tokens[place], "<|eot_id|>", special), DecodeConfig(prompt_buckets=(16,)))
    found = lm.generate_ids([PROMPT], seeds=[0], max_new_tokens=12)[0]
    assert (found.finish_reason, found.token_ids) == ("eos", tokens[: place + 1])
    assert "<|eot_id|>" not in found.text
    assert found.text == lm.model.tokenizer.decode(tokens[:place], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["<|halt|>", "<|eot_id|>"])
def test_a_special_token_as_a_stop_string(endless, name):
    model, tokens, place = endless
    lm = Engine(named(model, tokens[place], name, True)._replace(eos_ids=()), DecodeConfig(prompt_buckets=(16,), stream_chunk=3))
    found = lm.generate_ids([PROMPT], seeds=[0], max_new_tokens=12, stop=name)[0]
    assert (found.finish_reason, found.token_ids) == ("stop", tokens[: place + 1])
    assert found.text == lm.model.tokenizer.decode(tokens[:place], skip_special_tokens=True)
    assert lm.generate_ids([PROMPT], seeds=[0], max_new_tokens=12, stop=[name, "zzz"])[0] == dataclasses.replace(
        found, seconds=ANY, first_token_seconds=ANY, log=ANY
    )


def test_names_are_there_once():
    assert len(set(NAMES)) == len(NAMES)
