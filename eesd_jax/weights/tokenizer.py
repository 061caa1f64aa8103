"""Tokenizers: from a Hugging Face folder, or built from the fields of a GGUF file without PyTorch.

Two families appear in GGUF files of the supported architectures: byte-level BPE (`gpt2`: Llama 3, Qwen, SmolLM) with one of a few
pre-tokenizers, and SentencePiece BPE with byte fallback (`llama`: Llama 1/2, Mistral, TinyLlama).
"""

import pathlib
from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from eesd_jax.errors import UserError
from eesd_jax.weights.gguf import GGUFSource

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(*before: pre_tokenizers.PreTokenizer, gpt2_words: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2_words)])


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return _byte_level(pre_tokenizers.Digits(individual_digits=True), gpt2_words=True)


def _words(digits: str) -> pre_tokenizers.PreTokenizer:
    return _byte_level(pre_tokenizers.Split(Regex(_WORDS % digits), behavior="isolated"), gpt2_words=False)


# `tokenizer.ggml.pre` -> how text is cut before BPE.
_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": lambda: _byte_level(gpt2_words=True),
    "gpt-2": lambda: _byte_level(gpt2_words=True),
    "smollm": _single_digits,
    "starcoder": _single_digits,
    "llama-bpe": lambda: _words(r"\p{N}{1,3}"),
    "qwen2": lambda: _words(r"\p{N}"),
    "deepseek-r1-qwen": lambda: _words(r"\p{N}"),
}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # llama.cpp's token types


def from_folder(folder: pathlib.Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder; UserError where it has none that can be read."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{folder}: no tokenizer can be loaded from this folder; expected tokenizer.json ({reason})") from None


def from_gguf(source: GGUFSource) -> PreTrainedTokenizerFast:
    """Builds the tokenizer from a GGUF file's fields: vocabulary, merges or scores, special tokens, chat template.

    Raises:
      UserError: a field missing, or a tokenizer model or pre-tokenizer that is not supported.
    """
    vocabulary = source.field("tokenizer.ggml.tokens")
    if not vocabulary:
        raise UserError(f"{source.description}: no metadata field tokenizer.ggml.tokens")
    kind = source.field("tokenizer.ggml.model")
    if kind == "gpt2":
        core, bos_by_default = _byte_level_bpe(source, vocabulary)
    elif kind == "llama":
        core, bos_by_default = _sentencepiece_bpe(source, vocabulary), True
    else:
        raise UserError(f"{source.description}: tokenizer model {kind!r} is not supported; supported are 'gpt2' and 'llama'")

    token_types = source.field("tokenizer.ggml.token_type", [_NORMAL] * len(vocabulary))
    core.add_special_tokens([_added(token) for token, type_ in zip(vocabulary, token_types, strict=True) if type_ == _CONTROL])
    core.add_tokens([_added(token) for token, type_ in zip(vocabulary, token_types, strict=True) if type_ == _USER_DEFINED])

    def special(name: str) -> str | None:
        token_id = source.field(f"tokenizer.ggml.{name}_token_id")
        return None if token_id is None else vocabulary[token_id]

    bos, eos = special("bos"), special("eos")
    if bos is not None and source.field("tokenizer.ggml.add_bos_token", bos_by_default):
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary.index(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=eos,
        pad_token=special("padding"),
        unk_token=special("unknown"),
        chat_template=source.field("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )


def _added(token: str) -> AddedToken:
    return AddedToken(token, normalized=False, special=False)


def _byte_level_bpe(source: GGUFSource, vocabulary: list[str]) -> tuple[Tokenizer, bool]:
    pre = source.field("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise UserError(f"{source.description}: pre-tokenizer {pre!r} is not supported; supported are {', '.join(_PRE_TOKENIZERS)}")
    merges = [tuple(merge.split(" ", 1)) for merge in source.field("tokenizer.ggml.merges", [])]
    is_llama3 = pre == "llama-bpe"
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges, ignore_merges=is_llama3))
    if "qwen" in pre:
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    core.decoder = decoders.ByteLevel()
    return core, is_llama3


def _sentencepiece_bpe(source: GGUFSource, vocabulary: list[str]) -> Tokenizer:
    scores = source.field("tokenizer.ggml.scores")
    if scores is None:
        raise UserError(f"{source.description}: no metadata field tokenizer.ggml.scores")
    ids = {token: i for i, token in enumerate(vocabulary)}
    # A SentencePiece model has no list of merges: every split of a token into two tokens is one, and the token's score ranks it.
    merges = []
    for token, score in zip(vocabulary, scores, strict=True):
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token)) if token[:cut] in ids and token[cut:] in ids]
        splits.sort(key=lambda parts: (ids[parts[0]], ids[parts[1]]))
        merges += [(score, parts) for parts in splits]
    merges.sort(key=lambda merge: -merge[0])  # stable: equal scores stay in order
    unknown = vocabulary[source.field("tokenizer.ggml.unknown_token_id", 0)]
    core = Tokenizer(models.BPE(vocab=ids, merges=[parts for _, parts in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = source.field("tokenizer.ggml.add_space_prefix", True)
    core.normalizer = normalizers.Sequence(([normalizers.Prepend("▁")] if prefix else []) + [normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()] + ([decoders.Strip(content=" ", left=1)] if prefix else [])
    )
    return core
