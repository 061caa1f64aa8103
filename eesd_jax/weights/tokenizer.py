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
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def from_folder(folder: pathlib.Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder; UserError where it has none that can be read."""
    # transformers makes an empty tokenizer where there is no file at all.
    if not any((folder / name).exists() for name in _VOCABULARY_FILES):
        raise UserError(f"{folder}: no tokenizer in this folder; expected {' or '.join(_VOCABULARY_FILES)}")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: the tokenizer in this folder cannot be loaded ({reason})") from None


def from_gguf(source: GGUFSource) -> PreTrainedTokenizerFast:
    """Builds the tokenizer from a GGUF file's fields: vocabulary, merges or scores, special tokens, chat template.

    Raises:
      UserError: a field missing, or a tokenizer model or pre-tokenizer that is not supported.
    """
    vocabulary = source.field("tokenizer.ggml.tokens")
    if not vocabulary:
        raise UserError(f"{source.description}: no metadata field tokenizer.ggml.tokens")
    types = _per_token(source, "token_type", vocabulary, default=[_NORMAL] * len(vocabulary))
    kind = source.field("tokenizer.ggml.model")
    if kind == "gpt2":
        core, bos_by_default = _byte_level_bpe(source, vocabulary)
    elif kind == "llama":
        core, bos_by_default = _sentencepiece_bpe(source, vocabulary, types), True
    else:
        raise UserError(f"{source.description}: tokenizer model {kind!r} is not supported; supported are 'gpt2' and 'llama'")
    core.add_special_tokens([_added(token) for token, type_ in zip(vocabulary, types, strict=True) if type_ == _CONTROL])
    core.add_tokens([_added(token) for token, type_ in zip(vocabulary, types, strict=True) if type_ == _USER_DEFINED])

    def special(name: str) -> str | None:
        token_id = source.field(f"tokenizer.ggml.{name}_token_id")
        return vocabulary[token_id] if token_id is not None and 0 <= token_id < len(vocabulary) else None

    bos = special("bos")
    if bos is not None and source.field("tokenizer.ggml.add_bos_token", bos_by_default):
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary.index(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=special("eos"),
        pad_token=special("padding"),
        unk_token=special("unknown"),
        chat_template=source.field("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )


def _per_token(source: GGUFSource, name: str, vocabulary: list[str], default: list[int] | None = None) -> list:
    values = source.field(f"tokenizer.ggml.{name}", default)
    if values is None or len(values) != len(vocabulary):
        found = "no" if values is None else f"{len(values)} values in"
        raise UserError(
            f"{source.description}: {found} metadata field tokenizer.ggml.{name}; expected one for each of {len(vocabulary)} tokens"
        )
    return values


def _added(token: str) -> AddedToken:
    return AddedToken(token, normalized=False, special=False)


def _byte_level_bpe(source: GGUFSource, vocabulary: list[str]) -> tuple[Tokenizer, bool]:
    pre = source.field("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise UserError(f"{source.description}: pre-tokenizer {pre!r} is not supported; supported are {', '.join(_PRE_TOKENIZERS)}")
    merges = source.field("tokenizer.ggml.merges")
    if merges is None:
        raise UserError(f"{source.description}: no metadata field tokenizer.ggml.merges")
    merges = [tuple(merge.split(" ", 1)) for merge in merges]
    is_llama3 = pre == "llama-bpe"
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges, ignore_merges=is_llama3))
    if "qwen" in pre:
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    core.decoder = decoders.ByteLevel()
    return core, is_llama3


def _sentencepiece_bpe(source: GGUFSource, vocabulary: list[str], types: list[int]) -> Tokenizer:
    scores = _per_token(source, "scores", vocabulary)
    ids = {token: i for i, token in enumerate(vocabulary)}
    pieces = {token for token, type_ in zip(vocabulary, types, strict=True) if type_ in (_NORMAL, _USER_DEFINED)}
    # A SentencePiece model has no list of merges: every split of a piece into two pieces is one, and the piece's score ranks it.
    merges = []
    for token, score in zip(vocabulary, scores, strict=True):
        if token in pieces:
            splits = [(token[:cut], token[cut:]) for cut in range(1, len(token)) if token[:cut] in pieces and token[cut:] in pieces]
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
