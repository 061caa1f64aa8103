"""A folder, its `tokenizer.model` alone and a GGUF file of one model give the tokens that the files themselves stand for."""

import json
import pathlib
import warnings
from typing import Any

import pytest
import sentencepiece
import tiny
from families import CHAT, FAMILIES, TEXTS, gguf_fields, proto, spm, write
from tokenizers import Tokenizer, processors

from eesd_jax.errors import UserError
from eesd_jax.weights.tokenizer import from_folder, from_gguf


class Fields:
    """The metadata of a GGUF file that was never written."""

    description = "model.gguf"

    def __init__(self, fields: dict[str, Any]):
        self._fields = fields

    def field(self, name: str, default: Any = None) -> Any:
        return self._fields.get(name, default)


def assert_alike(tokenizer, core: Tokenizer) -> None:
    """The same ids for every text and for a chat, and the same text for ids."""
    for text in TEXTS:
        expected = core.encode(text)
        assert tokenizer(text).input_ids == expected.ids, repr(text)
        plain = core.encode(text, add_special_tokens=False).ids
        assert tokenizer(text, add_special_tokens=False).input_ids == plain, repr(text)
        assert tokenizer.decode(plain) == core.decode(plain, skip_special_tokens=False)
        assert tokenizer.decode(plain, skip_special_tokens=True) == core.decode(plain)
    if tokenizer.chat_template:
        chat = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        assert tokenizer(chat, add_special_tokens=False).input_ids == core.encode(chat, add_special_tokens=False).ids
        assert tokenizer.eos_token in chat or "im_end" in chat


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_gives_the_tokens_of_its_tokenizer_json(tmp_path, name):
    core = write(tmp_path, name)
    assert_alike(from_folder(tmp_path), core)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family[4]])
def test_a_gguf_file_gives_the_tokens_of_the_folder(tmp_path, name):
    core = write(tmp_path, name)
    _, _, _, template, pre = FAMILIES[name]
    ours = from_gguf(Fields(gguf_fields(core, template, pre)))
    assert_alike(ours, core)
    folder = from_folder(tmp_path)
    assert (ours.bos_token_id, ours.eos_token_id) == (folder.bos_token_id, folder.eos_token_id)
    assert ours.chat_template == folder.chat_template


# tokenizer.model alone -------------------------------------------------------------------------------------------------------------


def write_model(folder: pathlib.Path, model: bytes, **config: Any) -> None:
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "config.json").write_text(json.dumps(tiny.hf_config()))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} | config))


@pytest.mark.parametrize("config", [{}, {"legacy": False}, {"legacy": True, "add_bos_token": True}], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"user_defined_symbols": "[INST],<<SYS>>"},
        {"byte_fallback": False},
        {"model_type": "unigram", "vocab_size": 330},
    ],
    ids=lambda options: " ".join(options) or "llama",
)
def test_a_model_file_alone_gives_the_tokens_of_sentencepiece(tmp_path, options, config):
    model = spm(**options)
    write_model(tmp_path, model, **config)
    processor, ours = sentencepiece.SentencePieceProcessor(model_proto=model), from_folder(tmp_path)
    taken_for_text = ["<s>", "</s>", "<unk>"]
    if "model_type" in options:
        taken_for_text.append("<0x0A>")  # by the models of the tokenizers library alone it is not
    for text in TEXTS:
        if not any(token in text for token in taken_for_text):
            assert ours(text, add_special_tokens=False).input_ids == processor.encode(text), repr(text)
            assert ours(text).input_ids == [1, *processor.encode(text)], repr(text)
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == ("<s>", "</s>", "<unk>")


def test_what_legacy_says_decides_on_spaces_behind_special_tokens(tmp_path):
    for legacy, expected in ((None, ["a", "</s>", "▁a"]), (True, ["a", "</s>", "▁a"]), (False, ["a", "</s>", "a"])):
        write_model(tmp_path, spm(), legacy=legacy)
        ours = from_folder(tmp_path)
        ids = ours("a</s>a", add_special_tokens=False).input_ids
        plain = "".join(ours.convert_ids_to_tokens(ids)).replace("▁", " ")
        assert plain == "".join(["▁", *expected]).replace("▁", " ")


def test_a_model_file_with_added_tokens(tmp_path):
    size = len(proto(spm()).pieces)
    write_model(tmp_path, spm(), pad_token="[PAD]")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size + 1, "[PAD]": size}))
    ours = from_folder(tmp_path)
    assert ours("a<|im_end|>", add_special_tokens=False).input_ids[-1] == size + 1
    assert (ours.pad_token_id, len(ours)) == (size, size + 2)
    decoder = {str(size): {"content": "<|im_end|>", "special": True}, "5": {"content": "<tool>", "special": False}}
    write_model(tmp_path, spm(), added_tokens_decoder=decoder)
    ours = from_folder(tmp_path)
    assert ours("<tool><|im_end|>", add_special_tokens=False).input_ids == [5, size]
    assert ours.decode([5, size], skip_special_tokens=True) == "<tool>"


# Several files -----------------------------------------------------------------------------------------------------------------------


def test_tokenizer_json_comes_before_files_of_an_older_generation(tmp_path):
    core = write(tmp_path, "Llama 2")
    (tmp_path / "tokenizer.model").write_bytes(spm(vocab_size=330))
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert_alike(from_folder(tmp_path), core)


def test_a_template_of_its_own_comes_before_that_of_the_config(tmp_path):
    write(tmp_path, "Qwen 2")
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    assert from_folder(tmp_path).apply_chat_template(CHAT[:1], tokenize=False) == " Why?!"
    (tmp_path / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ messages[0]['role'] }}"}]
    write(tmp_path, "Qwen 2", chat_template=named)
    assert from_folder(tmp_path).apply_chat_template(CHAT[:1], tokenize=False) == "user"


def test_special_tokens_are_named_in_either_file(tmp_path):
    write(tmp_path, "Qwen 2", eos_token=None, bos_token=None, chat_template=tiny.CHAT_TEMPLATE)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": tiny.END, "lstrip": False}}))
    assert from_folder(tmp_path).eos_token == tiny.END
    listed = {"0": {"content": "!", "special": False}}
    for more, expected in (({}, tiny.END), ({"added_tokens_decoder": listed}, tiny.TURN_END)):
        write(tmp_path, "Qwen 2", eos_token=tiny.TURN_END, **more)
        assert from_folder(tmp_path).eos_token == expected  # as in transformers
    (tmp_path / "special_tokens_map.json").unlink()
    write(tmp_path, "Qwen 2", eos_token={"__type": "AddedToken", "content": tiny.TURN_END, "normalized": False})
    assert from_folder(tmp_path).eos_token == tiny.TURN_END


def test_special_tokens_without_a_text_are_none(tmp_path):
    write_model(tmp_path, spm(), bos_token="", eos_token={"content": ""}, unk_token=None, additional_special_tokens=["", None])
    tokenizer = from_folder(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer("a").input_ids[0]) == ("<s>", "</s>", 1)
    write(tmp_path, "Qwen 2", bos_token="", additional_special_tokens=[{"content": tiny.TURN_END}, None])
    assert from_folder(tmp_path).bos_token is None


def test_truncation_that_a_file_was_saved_with_is_not_applied(tmp_path):
    core = write(tmp_path, "SmolLM2")
    core.enable_truncation(4)
    core.enable_padding(length=64)
    core.save(str(tmp_path / "tokenizer.json"))
    core.no_truncation()
    core.no_padding()
    assert_alike(from_folder(tmp_path), core)


@pytest.mark.parametrize("told", [True, False])
def test_llamas_config_decides_on_the_bos(tmp_path, told):
    core = write(tmp_path, "Llama 2", add_bos_token=told)
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    for saved in (core, FAMILIES["Llama 2"][2]()):  # one without and one with it
        saved.save(str(tmp_path / "tokenizer.json"))
        assert from_folder(tmp_path)("a").input_ids == [1] * told + core.encode("a").ids
    write(tmp_path, "Llama 3", add_bos_token=False)  # where transformers never looked at it
    assert from_folder(tmp_path)("a").input_ids[0] == from_folder(tmp_path).bos_token_id


def test_an_added_token_whose_id_is_taken_is_left_out_with_a_warning(tmp_path):
    core = write(tmp_path, "SmolLM2", added_tokens_decoder={"7": {"content": "<new>"}, str(2 + 500): {"content": tiny.TURN_END}})
    with pytest.warns(UserWarning, match="1 added tokens are left out, .* the first, '<new>' is to be id 7"):
        tokenizer = from_folder(tmp_path)
    assert_alike(tokenizer, core)


DAMAGES = {
    "no tokenizer.json but a text": ("tokenizer.json", b"hello", "cannot be loaded"),
    "settings that are a list": ("tokenizer_config.json", b"[]", "expected a JSON object"),
    "a number for a token": ("tokenizer_config.json", b'{"eos_token": 2}', "eos_token of the tokenizer is 2; expected a text"),
    "a number for a template": ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template of the tokenizer is 3"),
    "a template without a text": (
        "tokenizer_config.json",
        b'{"chat_template": [{"name": "default"}]}',
        "chat_template of the tokenizer is",
    ),
    "an id that is a text": ("added_tokens.json", b'{"<new>": "last"}', "added token 'last'"),
    "a token that is a number": ("tokenizer_config.json", b'{"added_tokens_decoder": {"2": {"content": 5}}}', "added token '2'"),
    "a flag that is a text": (
        "tokenizer_config.json",
        b'{"added_tokens_decoder": {"2": {"content": "a", "special": "no"}}}',
        "added token",
    ),
    "tokens in a list": ("tokenizer_config.json", b'{"added_tokens_decoder": ["a"]}', "added token"),
    "half a character": ("tokenizer_config.json", b'{"added_tokens_decoder": {"2": {"content": "\\ud83d"}}}', "not valid JSON"),
    "a pointer": ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
    "bytes that are no text": ("chat_template.jinja", b"\xff\xfe", "chat_template.jinja: cannot be read"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_files_that_cannot_be_used(tmp_path, case):
    file, content, message = DAMAGES[case]
    write(tmp_path, "Qwen 2")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_token_for_what_is_unknown_that_is_not_there(tmp_path):
    """The library would raise at the first text that has something unknown in it."""
    write(tmp_path, "Llama 2")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"] |= {"unk_token": "<missing>", "byte_fallback": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"the tokenizer in this folder cannot be loaded .*<missing>"):
        from_folder(tmp_path)


def test_a_template_with_a_token_that_is_not_defined(tmp_path):
    """The library would panic, not at loading, but at each text."""
    write(tmp_path, "Llama 3")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    for nested in (False, True):
        content["post_processor"]["special_tokens"] = {}
        if nested:
            content["post_processor"] = {"type": "Sequence", "processors": [content["post_processor"]]}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"the template of tokenizer.json puts '<\|im_start\|>' around texts, which it does not define"):
            from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", b"aGVsbG8= 0\n", spm()[:1000]], ids=["empty", "text", "tiktoken", "truncated"])
def test_model_files_that_are_none(tmp_path, content):
    write_model(tmp_path, content)
    with pytest.raises(UserError, match=r"tokenizer\.model: no SentencePiece model .*expected one, or a tokenizer\.json"):
        from_folder(tmp_path)


def test_nothing_is_warned_of_where_files_agree(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in FAMILIES:
            write(tmp_path, name)
            from_folder(tmp_path)
