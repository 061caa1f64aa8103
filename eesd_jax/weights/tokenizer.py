"""Tokenizers: of a Hugging Face folder, as its files say, or built from the fields of a GGUF file without PyTorch.

Of a folder `tokenizer.json` itself is loaded where there is one (see `tokenizer_files.py`). Two families appear in GGUF files of the
supported architectures: byte-level BPE (`gpt2`: Llama 3, Qwen, SmolLM) with one of a few pre-tokenizers, and SentencePiece BPE with byte
fallback (`llama`: Llama 1/2, Mistral, TinyLlama; see `sentencepiece.py`).
"""

import pathlib
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from eesd_jax.errors import UserError
from eesd_jax.weights import sentencepiece, tokenizer_files
from eesd_jax.weights.end_tokens import NAMES
from eesd_jax.weights.gguf import GGUFSource
from eesd_jax.weights.sentencepiece import Kind, Pieces, Prefix

if TYPE_CHECKING:  # it takes as long as JAX to import, and nothing needs it before a model is loaded
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(*before: pre_tokenizers.PreTokenizer, gpt2_words: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2_words)])


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return _byte_level(pre_tokenizers.Digits(individual_digits=True), gpt2_words=True)


def _words(digits: str) -> pre_tokenizers.PreTokenizer:
    return _byte_level(pre_tokenizers.Split(Regex(_WORDS % digits), behavior="isolated"), gpt2_words=False)


_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
# `tokenizer.ggml.pre` -> how text is cut before BPE.
_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": lambda: _byte_level(gpt2_words=True),
    "gpt-2": lambda: _byte_level(gpt2_words=True),
    "smollm": _single_digits,
    "starcoder": _single_digits,
    **dict.fromkeys(_LLAMA3, lambda: _words(r"\p{N}{1,3}")),
    "qwen2": lambda: _words(r"\p{N}"),
    "deepseek-r1-qwen": lambda: _words(r"\p{N}"),
}
# Where a file of a SentencePiece vocabulary does not say which id it is, llama.cpp takes these.
_SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}


def from_folder(folder: pathlib.Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a Hugging Face folder; UserError where it has none that can be read."""
    return tokenizer_files.load(folder)


def from_gguf(source: GGUFSource) -> "PreTrainedTokenizerFast":
    """Builds the tokenizer from a GGUF file's fields: vocabulary, merges or scores, special tokens, chat template.

    Raises:
      UserError: a field missing or of another kind, or a tokenizer model or pre-tokenizer that is not supported.
    """
    from transformers import PreTrainedTokenizerFast

    fields = _Fields(source)
    vocabulary = [token or f"[EMPTY_{i}]" for i, token in enumerate(fields.list_of(str, "tokens"))]  # as llama.cpp calls them
    sentencepiece.check_vocabulary(vocabulary, source.description)
    if not vocabulary:
        raise UserError(f"{source.description}: metadata field tokenizer.ggml.tokens is empty; expected a vocabulary")
    kind = fields.get("model")
    if kind == "gpt2":
        core, bos_by_default = _byte_level_bpe(fields, vocabulary)
    elif kind == "llama":
        core, bos_by_default = _sentencepiece_bpe(fields, vocabulary), True
    else:
        raise UserError(f"{source.description}: tokenizer model {kind!r} is not supported; supported are 'gpt2' and 'llama'")

    def special(name: str) -> str | None:
        token_id = fields.token_id(name, len(vocabulary))
        return None if token_id is None else vocabulary[token_id]

    bos = special("bos")
    if bos is not None and fields.get("add_bos_token", bool, bos_by_default):
        core.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, vocabulary.index(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=special("eos"),
        pad_token=special("padding"),
        unk_token=special("unknown"),
        chat_template=fields.chat_template(),
        clean_up_tokenization_spaces=False,
    )


class _Fields:
    """The fields of a GGUF file that describe its tokenizer, each checked as it is read.

    Raises:
      UserError: from every method, for a field that is missing, or of another kind than it must be.
    """

    def __init__(self, source: GGUFSource):
        self.source = source

    def get(self, name: str, kind: type = str, default: Any = None) -> Any:
        value = self.source.field(f"tokenizer.ggml.{name}", default)
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise UserError(f"{self.source.description}: metadata field tokenizer.ggml.{name} is {value!r:.80}; expected {_KINDS[kind]}")
        return value

    def list_of(self, kind: type, name: str, length: int | None = None, default: list | None = None) -> list:
        """A list, of one value for each of `length` tokens, if that is given."""
        values = self.get(name, list, default)
        if values is None:
            raise UserError(f"{self.source.description}: no metadata field tokenizer.ggml.{name}")
        if length is not None and len(values) != length:
            raise UserError(
                f"{self.source.description}: {len(values)} values in metadata field tokenizer.ggml.{name}; "
                f"expected one for each of {length} tokens"
            )
        if wrong := [value for value in values if not isinstance(value, kind)]:
            where = f"{self.source.description}: metadata field tokenizer.ggml.{name}"
            raise UserError(f"{where} has {wrong[0]!r:.80}; expected {_KINDS[kind]} in each place")
        return values

    def token_id(self, name: str, count: int) -> int | None:
        """The id of a special token; files say that there is none by leaving it out, or by an id that no token has."""
        default = _SENTENCEPIECE_IDS.get(name) if self.get("model") == "llama" else None
        found = self.get(f"{name}_token_id", int, default)
        if found is None or not 0 <= found < count:
            found = default
        return found if found is not None and found < count else None

    def types(self, vocabulary: list[str]) -> list[int]:
        """The kind of each token."""
        stated = self.list_of(int, "token_type", len(vocabulary), default=[Kind.NORMAL] * len(vocabulary))
        # Some files call the end of a turn normal or the user's; a chat's text would then be cut through it. llama.cpp mends it, too.
        return [Kind.CONTROL if token in NAMES else type_ for token, type_ in zip(vocabulary, stated, strict=True)]

    def chat_template(self) -> str | None:
        template = self.source.field("tokenizer.chat_template")
        if not isinstance(template, str | None):
            raise UserError(f"{self.source.description}: metadata field tokenizer.chat_template is {template!r:.80}; expected a text")
        return template


_KINDS = {str: "a text", int: "an integer", bool: "true or false", list: "a list", float: "a number"}


def _byte_level_bpe(fields: _Fields, vocabulary: list[str]) -> tuple[Tokenizer, bool]:
    source, pre = fields.source, fields.get("pre")
    if pre is None:
        pre = "default"
        told = "no metadata field tokenizer.ggml.pre, so it does not say how text is cut into words"
        warnings.warn(f"{source.description}: {told}; GPT-2's way is taken, which may be another than the model's", stacklevel=2)
    if pre not in _PRE_TOKENIZERS:
        raise UserError(f"{source.description}: pre-tokenizer {pre!r} is not supported; supported are {', '.join(_PRE_TOKENIZERS)}")
    merges = [tuple(merge.split(" ", 1)) for merge in fields.list_of(str, "merges")]
    ids = {token: i for i, token in enumerate(vocabulary)}
    for merge in merges:
        if len(merge) != 2 or not all(part in ids for part in (*merge, "".join(merge))):
            raise UserError(
                f"{source.description}: merge {' '.join(merge)!r:.80} in tokenizer.ggml.merges; expected two tokens that make a third"
            )
    types = fields.types(vocabulary)
    is_llama3 = pre in _LLAMA3
    core = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=is_llama3))
    if "qwen" in pre:
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    core.decoder = decoders.ByteLevel()
    typed = list(zip(vocabulary, types, strict=True))
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token, type_ in typed if type_ == Kind.CONTROL])
    core.add_tokens([AddedToken(token, normalized=False, special=False) for token, type_ in typed if type_ == Kind.USER_DEFINED])
    return core, is_llama3


def _sentencepiece_bpe(fields: _Fields, vocabulary: list[str]) -> Tokenizer:
    pieces = Pieces(
        tokens=vocabulary,
        scores=fields.list_of(float, "scores", len(vocabulary)),
        kinds=fields.types(vocabulary),
        unknown=fields.token_id("unknown", len(vocabulary)),
        prefix=Prefix.ALWAYS if fields.get("add_space_prefix", bool, True) else Prefix.NEVER,
    )
    return sentencepiece.build(pieces, fields.source.description)
