"""Tokenizers built from GGUF fields give the tokens of the Hugging Face tokenizers with the same vocabulary and merges."""

import functools
import json
import unicodedata
from typing import Any

import pytest
import tiny
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter, generate_merges

from eesd_jax.errors import UserError
from eesd_jax.weights import hub
from eesd_jax.weights.gguf import GGUFSource
from eesd_jax.weights.tokenizer import from_gguf

TEXTS = [
    "hello world, hello there",
    "The QUICK brown fox: don't, we'll, I'M, you'RE; it's.",
    "12 345 6789 1234567 3.14 2nd ½ ٣٤",
    "one  two   three    \t tab\n\nnew line\r\n  indented \n \n",
    " leading and trailing  ",
    "naïve café Ǆ ﬁ Ω 日本語 한국어 Привет مرحبا",
    "😀 👩‍👩‍👧‍👦 \u200d\ufe0f \U0001f1e9\U0001f1ea",
    'def f(x):\n    return x**2  # !?{}[]<>|_-+=~`@$%^&\\/"',
    "\x00\x01\x7f",
    "a",
    " ",
    "",
]
MARKUP = "<|im_start|>user\nhello<|im_end|>\n"


class Fields:
    """The metadata of a GGUF file that was never written."""

    description = "model.gguf"

    def __init__(self, fields: dict[str, Any]):
        self._fields = {name: value for name, value in fields.items() if value is not None}

    def field(self, name: str, default: Any = None) -> Any:
        return self._fields.get(name, default)


@functools.cache
def wide_bpe() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges cross words, digits and line ends, so that every way of cutting the text gives other tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in (tiny.END, tiny.TURN_START, tiny.TURN_END)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=tiny.TURN_START, eos_token=tiny.TURN_END, pad_token=tiny.END)


def wide_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(wide_bpe().backend_tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


class Llama3Converter(TikTokenConverter):
    def extract_vocab_merges_from_model(self, tiktoken_url):
        return wide_vocabulary()


def smollm_reference() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(*wide_vocabulary()))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core)


REFERENCES = {
    "smollm": smollm_reference,
    "llama-bpe": lambda: PreTrainedTokenizerFast(tokenizer_object=Llama3Converter().converted()),
    "qwen2": lambda: Qwen2Tokenizer(*wide_vocabulary()),
}


def built(pre: str = "smollm", **changes: Any) -> PreTrainedTokenizerFast:
    fields = tiny.gguf_tokenizer(wide_bpe(), pre) | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    return from_gguf(Fields(fields))


def round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    return tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True)


@pytest.mark.parametrize("pre", REFERENCES)
def test_byte_level_tokens_equal_those_of_the_reference(pre):
    ours, reference = built(pre), REFERENCES[pre]()
    for text in TEXTS:
        assert ours.encode(text) == reference.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize("name", ["llama3", "llama-v3"])
def test_other_names_of_llama_3(name):
    for text in TEXTS:
        assert built(name).encode(text) == built("llama-bpe").encode(text)


def test_a_file_that_does_not_say_how_text_is_cut_is_warned_of():
    with pytest.warns(UserWarning, match=r"model\.gguf: no metadata field tokenizer\.ggml\.pre, .* GPT-2's way is taken"):
        tokenizer = built(pre=None)
    assert tokenizer.encode("hello 12") == built("gpt-2").encode("hello 12")


def test_pre_tokenizers_differ():
    text = "12 345\n\nx 1234"
    assert len({tuple(built(pre).encode(text)) for pre in REFERENCES}) == len(REFERENCES)


def test_only_llama_3_takes_a_whole_word_that_no_merge_makes():
    word = next(token for token in wide_vocabulary()[0] if token.isascii() and token.isalpha() and len(token) > 3)
    assert len(built("llama-bpe", merges=[]).encode(word, add_special_tokens=False)) == 1
    assert len(built("qwen2", merges=[]).encode(word)) == len(word)


@pytest.mark.parametrize("pre", REFERENCES)
def test_byte_level_round_trip(pre):
    tokenizer = built(pre)
    for text in TEXTS:
        assert round_trip(tokenizer, text) == (unicodedata.normalize("NFC", text) if pre == "qwen2" else text)


@pytest.mark.parametrize("pre", REFERENCES)
def test_special_tokens_are_single_ids_and_can_be_left_out(pre):
    tokenizer = built(pre)
    ids = tokenizer.encode(MARKUP, add_special_tokens=False)
    start, end = tokenizer.convert_tokens_to_ids([tiny.TURN_START, tiny.TURN_END])
    assert ids[0] == start
    assert ids[-1 - len(tokenizer.encode("\n", add_special_tokens=False))] == end
    assert ids.count(start) == ids.count(end) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhello\n"
    assert tokenizer.decode(ids) == MARKUP
    assert len(tokenizer) == len(wide_bpe())


def test_user_defined_tokens_are_single_ids_that_stay_in_the_text():
    types = [1] * len(wide_bpe())
    types[wide_bpe().convert_tokens_to_ids(tiny.TURN_START)] = 4
    tokenizer = built(token_type=types, bos_token_id=None, eos_token_id=None)
    assert len(tokenizer.encode(tiny.TURN_START)) == 1
    assert round_trip(tokenizer, MARKUP) == MARKUP.replace(tiny.TURN_END, "")  # the end of a turn is no text, whatever a file calls it


@pytest.mark.parametrize(
    ("pre", "told", "added"), [("smollm", None, False), ("llama-bpe", None, True), ("smollm", True, True), ("llama-bpe", False, False)]
)
def test_bos_is_added_as_told(pre, told, added):
    tokenizer = built(pre, add_bos_token=told)
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == [tokenizer.bos_token_id] * added + plain
    assert round_trip(tokenizer, "hello") == "hello"


def test_ids_that_no_token_has_are_left_out():
    tokenizer = built(bos_token_id=2**32 - 1, padding_token_id=-1, add_bos_token=True)
    assert tokenizer.bos_token is None
    assert tokenizer.pad_token is None


def test_chat_template_of_the_file_is_used(tmp_path):
    template = "{% for m in messages %}{{ m['role'] }}={{ m['content'] }};{% endfor %}"
    file = tiny.write_gguf(tmp_path / "model.gguf", tiny.hf_config(), fields={"tokenizer.chat_template": template})
    messages = [{"role": "user", "content": "hi"}]
    assert from_gguf(GGUFSource(file)).apply_chat_template(messages, tokenize=False) == "user=hi;"
    assert built().chat_template is None


@functools.cache
def sentencepiece_fields() -> dict[str, Any]:
    """A vocabulary as in Llama 2: three special tokens, 256 bytes, pieces by falling score."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    core.train_from_iterator([t for t in TEXTS[:5] if t] * 3, trainers.BpeTrainer(vocab_size=400, limit_alphabet=60, show_progress=False))
    merged = ["".join(merge) for merge in json.loads(core.to_str())["model"]["merges"]]
    characters = [token for token in core.get_vocab() if len(token) == 1]
    pieces = list(dict.fromkeys([*merged, *sorted(characters)]))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces],
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokens_equal_those_of_transformers(prefix):
    fields = sentencepiece_fields()
    ids = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    scores = dict(list(zip(ids, fields["tokenizer.ggml.scores"], strict=True))[259:])
    reference = LlamaTokenizer(ids, generate_merges(ids, scores), add_prefix_space=prefix)
    ours = from_gguf(Fields(fields | {"tokenizer.ggml.add_space_prefix": prefix}))
    for text in TEXTS:
        # transformers gives a text that starts with a space no second one; SentencePiece and llama.cpp do, and so does not lose it.
        if not (prefix and text.startswith(" ")):
            assert ours.encode(text, add_special_tokens=False) == reference.encode(text, add_special_tokens=False), text
        assert round_trip(ours, text) == text


def test_sentencepiece_by_hand():
    pieces = {"▁": -9.0, "a": -9.1, "b": -9.2, "ab": -1.0, "▁a": -2.0, "<": -9.3, "s": -9.4, ">": -9.5, "<s": -3.0}
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces],
        "tokenizer.ggml.scores": [0.0] * 259 + list(pieces.values()),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    tokenizer = from_gguf(Fields(fields))

    def tokens(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer.encode(text))

    assert tokens("ab") == ["<s>", "▁", "ab"]  # "ab" scores higher than "▁a"
    assert tokens(" a") == ["<s>", "▁", "▁a"]
    assert tokens("a b") == ["<s>", "▁a", "▁", "b"]
    assert tokens("é\n") == ["<s>", "▁", "<0xC3>", "<0xA9>", "<0x0A>"]
    # As in llama.cpp, text behind a special token gets its space too; the control token itself is never merged together from "<s" and ">".
    assert tokens("a</s>a") == ["<s>", "▁a", "</s>", "▁a"]
    assert tokens("<s >") == ["<s>", "▁", "<s", "▁", ">"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "'bert' is not supported; supported are 'gpt2' and 'llama'"),
        ({"model": None}, "None is not supported"),
        ({"pre": "tekken"}, "'tekken' is not supported; supported are .*llama-bpe, .*qwen2"),
        ({"tokens": None}, "no metadata field tokenizer.ggml.tokens"),
        ({"merges": None}, "no metadata field tokenizer.ggml.merges"),
        ({"model": "llama"}, "no metadata field tokenizer.ggml.scores"),
        ({"token_type": [1, 1]}, "2 values in metadata field tokenizer.ggml.token_type"),
    ],
)
def test_fields_that_cannot_be_used(changes, message):
    with pytest.raises(UserError, match=f"^model.gguf: .*{message}"):
        built(**{"pre": "smollm"} | changes)


@pytest.mark.demo
def test_demo_tokens():
    tokenizer = from_gguf(GGUFSource(hub.fetch_demo()))
    assert tokenizer("Hello world 123").input_ids == [19556, 905, 216, 33, 34, 35]
    for text in TEXTS:
        assert round_trip(tokenizer, text) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
