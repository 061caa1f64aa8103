"""A small tokenizer of each family of models: its files as they are published, texts that try it, and what a GGUF file says of it."""

import functools
import io
import json
import pathlib
from typing import Any

import sentencepiece
import tiny
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import generate_merges

TEXTS = [
    *("", " ", "  ", "   ", "\t", "\n", "\n\n", "\n\n\n", "\t\n", " \n ", "\r\n"),
    *("Hello", " Hello", "  Hello", "    Hello\n    Hello", "Hello  world  ", " Hello, world!", "Hello\tWorld "),
    *(
        "[INST]",
        "[INST] Hi [/INST]",
        " [INST]Hi",
        "<<SYS>>\nBe brief.\n<</SYS>>\n\n",
        "{'a': [1, 2]}",
        " (",
        "\n =",
        "' era",
        "don't WE'LL it's",
    ),
    *(
        "3",
        "33",
        "333",
        "1234567 89",
        "½ ٣٤ Ⅷ",
        "naïve café",
        "cafe\u0301",
        "нещо",
        "日本語 한국어",
        "កាន់តែ",
        "🦙.cpp 👩‍👩‍👧",
        "\u200d\ufe0f",
    ),
    *(
        "\x00\x7f",
        "!!!!!!",
        "x = a[i]  # ok",
        "\u2581",
        "a\u2581b",
        "\u00a0a\u3000b",
        "~`@#$%^&*()_+",
        "The quick brown fox jumps over the lazy dog",
    ),
    *(
        "<s>",
        "</s>",
        "<unk>",
        "a</s>b",
        "a</s> b",
        " </s> ",
        "</s>\n<|user|>\nHi",
        "<0x0A>",
        "<|im_end|>",
        "<|im_start|>user\nHi<|im_end|>\n",
    ),
]
TRAINING = [
    "the quick brown fox jumps over the lazy dog",
    "[INST] hello world [/INST]",
    "12 345 don't we'll  it's",
    "user assistant\nHi {a}",
] * 10
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHAT = [
    {"role": "user", "content": " Why?"},
    {"role": "assistant", "content": "So.\n"},
    {"role": "user", "content": "[INST] <b>\nreally  "},
]


@functools.cache
def spm(**options: Any) -> bytes:
    """A SentencePiece model with byte fallback, as Llama's: spaces are kept as they are."""
    defaults = {
        "vocab_size": 380,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING), model_writer=file, hard_vocab_limit=False, minloglevel=2, **defaults | options
    )
    return file.getvalue()


def proto(model: bytes) -> Any:
    found = sentencepiece_model_pb2.ModelProto()
    found.ParseFromString(model)
    return found


def spm_core(prepend: str) -> Tokenizer:
    """As converters of transformers write it: `always` those of Llama 1 and 2 and Mistral 0.1, `first` those of Mistral 0.3."""
    pieces = proto(spm()).pieces
    ids = {piece.piece: i for i, piece in enumerate(pieces)}
    merges = generate_merges(ids, {piece.piece: piece.score for piece in pieces if piece.type == 1})
    core = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prepend == "always":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>")])
    return core


@functools.cache
def byte_level_vocabulary() -> tuple[dict[str, int], list]:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    core.train_from_iterator(TRAINING + [text for text in TEXTS if "<" not in text], trainer)
    model = json.loads(core.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def byte_level_core(normalizer, pre_tokenizer, *, bos: bool = False, **model: Any) -> Tokenizer:
    core = Tokenizer(models.BPE(*byte_level_vocabulary(), **model))
    if normalizer:
        core.normalizer = normalizer
    core.pre_tokenizer = pre_tokenizer
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (tiny.END, tiny.TURN_START, tiny.TURN_END)])
    start = core.token_to_id(tiny.TURN_START)
    core.post_processor = (
        processors.TemplateProcessing(single=[tiny.TURN_START, "$A"], special_tokens=[(tiny.TURN_START, start)])
        if bos
        else processors.ByteLevel(trim_offsets=False)
    )
    return core


def split(digits: str) -> pre_tokenizers.PreTokenizer:
    words = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])


# Of each family the `tokenizer.json`, the class that its `tokenizer_config.json` names, its template, and GGUF's name of how text is cut.
FAMILIES = {
    "Llama 2": ("llama", "LlamaTokenizer", lambda: spm_core("always"), LLAMA2, "default"),
    "CodeLlama": ("llama", "CodeLlamaTokenizer", lambda: spm_core("always"), LLAMA2, "default"),
    "TinyLlama": ("llama", "LlamaTokenizer", lambda: spm_core("always"), ZEPHYR, "default"),
    "Vicuna": ("llama", "LlamaTokenizerFast", lambda: spm_core("always"), None, "default"),
    "Mistral 0.1": ("mistral", "LlamaTokenizer", lambda: spm_core("always"), LLAMA2, "default"),
    "Mistral 0.3": ("mistral", "LlamaTokenizer", lambda: spm_core("first"), LLAMA2, None),  # GGUF has no word for its spaces
    "Llama 3": (
        "llama",
        "PreTrainedTokenizerFast",
        lambda: byte_level_core(None, split(r"\p{N}{1,3}"), bos=True, ignore_merges=True),
        tiny.CHAT_TEMPLATE,
        "llama-bpe",
    ),
    "SmolLM2": ("llama", "GPT2Tokenizer", lambda: byte_level_core(None, smollm()), tiny.CHAT_TEMPLATE, "smollm"),
    "Qwen 2": ("qwen2", "Qwen2Tokenizer", lambda: byte_level_core(normalizers.NFC(), split(r"\p{N}")), tiny.CHAT_TEMPLATE, "qwen2"),
    "Qwen 3": ("qwen3", "Qwen2Tokenizer", lambda: byte_level_core(normalizers.NFC(), split(r"\p{N}")), tiny.CHAT_TEMPLATE, "qwen2"),
}


def write(folder: pathlib.Path, name: str, **config: Any) -> Tokenizer:
    """Writes a family's folder, but for the weights, and returns what it must come to."""
    model_type, kind, core, template, _ = FAMILIES[name]
    core = core()
    is_spm = core.token_to_id("<s>") is not None
    bos, eos = ("<s>", "</s>") if is_spm else (tiny.TURN_START, tiny.TURN_END)
    settings = {"tokenizer_class": kind, "bos_token": bos, "eos_token": eos, "legacy": False, "clean_up_tokenization_spaces": True}
    settings |= {"add_bos_token": is_spm, "add_eos_token": False, "chat_template": template, "model_max_length": 10**30} | config
    (folder / "config.json").write_text(json.dumps(tiny.hf_config(model_type)))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    core.save(str(folder / "tokenizer.json"))
    return core


def gguf_fields(core: Tokenizer, template: str | None, pre: str) -> dict[str, Any]:
    """What llama.cpp's converter writes of a family."""
    is_spm = core.token_to_id("<s>") is not None
    tokens = [core.id_to_token(i) for i in range(core.get_vocab_size())]
    special = {token.content for token in core.get_added_tokens_decoder().values()}
    if is_spm:
        pieces = proto(spm()).pieces
        about = {
            "model": "llama",
            "scores": [float(piece.score) for piece in pieces],
            "token_type": [int(piece.type) for piece in pieces],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "unknown_token_id": 0,
        }
    else:
        about = {
            "model": "gpt2",
            "merges": [" ".join(merge) for merge in byte_level_vocabulary()[1]],
            "token_type": [3 if token in special else 1 for token in tokens],
            "bos_token_id": core.token_to_id(tiny.TURN_START),
            "eos_token_id": core.token_to_id(tiny.TURN_END),
        }
    fields = {f"tokenizer.ggml.{name}": value for name, value in (about | {"pre": pre, "tokens": tokens}).items()}
    return fields | ({"tokenizer.chat_template": template} if template else {})
