"""SentencePiece vocabularies, of a GGUF file or of a `tokenizer.model`, brought into the form of the `tokenizers` library.

Such a vocabulary has no list of merges, only a score for each piece. Left out: encoding with samples, and models of words or characters.
"""

import enum
import math
import pathlib
import re
from typing import NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from eesd_jax.errors import UserError

SPACE = "▁"
_LONGEST_MERGED = 256  # characters; the longest pieces of real models are runs of 32 spaces


class Kind(enum.IntEnum):
    """What a token is: SentencePiece's types, and llama.cpp's."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Prefix(enum.Enum):
    """Where a space is put before text: nowhere, before the first piece of a text, or also behind every special token."""

    NEVER = "never"
    FIRST = "first"
    ALWAYS = "always"


class Pieces(NamedTuple):
    """A vocabulary.

    tokens, scores, kinds: of every id. unknown: the id of what has no piece. is_unigram: the most probable cut of a text is taken, not BPE.
    prefix: where a space is added. charsmap: SentencePiece's compiled table of normalisations, empty for none.
    trims: spaces at the ends are dropped, and several become one.
    cuts: a user's own pieces are cut out of the text as SentencePiece does it, behind normalisation; else before, as llama.cpp does it.
    """

    tokens: list[str]
    scores: list[float]
    kinds: list[int]
    unknown: int
    prefix: Prefix
    is_unigram: bool = False
    charsmap: bytes = b""
    trims: bool = False
    cuts: bool = False

    def of_kind(self, kind: Kind) -> list[str]:
        return [token for token, its_kind in zip(self.tokens, self.kinds, strict=True) if its_kind == kind and token]


def read_model(path: pathlib.Path, prefix: Prefix) -> Pieces:
    """Reads a `tokenizer.model`.

    Args:
      prefix: where a space is added, if the model adds one at all.

    Raises:
      UserError: it is none, or of a kind that is not supported.
    """
    # The class that reads the file takes a tenth of a second to import.
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except (DecodeError, OSError) as error:
        raise UserError(
            f"{path}: no SentencePiece model ({str(error) or type(error).__name__}); expected one, or a tokenizer.json"
        ) from None
    if not proto.pieces:
        raise UserError(f"{path}: no SentencePiece model (it has no pieces); expected one, or a tokenizer.json")
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (trainer.UNIGRAM, trainer.BPE) or trainer.treat_whitespace_as_suffix:
        kind = sentencepiece_model_pb2.TrainerSpec.ModelType.Name(trainer.model_type)
        raise UserError(f"{path}: SentencePiece model of type {kind} is not supported; expected BPE or UNIGRAM, with spaces before words")
    kinds = [int(piece.type) for piece in proto.pieces]
    return Pieces(
        tokens=[piece.piece for piece in proto.pieces],
        scores=[float(piece.score) for piece in proto.pieces],
        kinds=kinds,
        unknown=kinds.index(Kind.UNKNOWN) if Kind.UNKNOWN in kinds else 0,
        # Of a text whose first spaces were dropped, nothing below can tell any more that it is the first.
        prefix=(Prefix.ALWAYS if normalizer.remove_extra_whitespaces else prefix) if normalizer.add_dummy_prefix else Prefix.NEVER,
        is_unigram=trainer.model_type == trainer.UNIGRAM,
        charsmap=normalizer.precompiled_charsmap,
        trims=normalizer.remove_extra_whitespaces,
        cuts=True,
    )


def build(pieces: Pieces, source: str) -> Tokenizer:
    """The tokenizer of a vocabulary.

    Raises:
      UserError: names `source` and what of the vocabulary cannot be used.
    """
    _check(pieces, source)
    core = Tokenizer(_unigram(pieces) if pieces.is_unigram else _bpe(pieces))
    core.normalizer = _normalizer(pieces)
    if steps := _pre_tokenizers(pieces):
        core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    strip = [] if pieces.prefix is Prefix.NEVER else [decoders.Strip(content=" ", left=1)]
    core.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    special = [token for kind in (Kind.CONTROL, Kind.UNKNOWN) for token in pieces.of_kind(kind)]
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    if not pieces.cuts:
        core.add_tokens([AddedToken(token, normalized=False, special=False) for token in pieces.of_kind(Kind.USER_DEFINED)])
    return core


def check_vocabulary(tokens: list[str], source: str) -> None:
    """Raises UserError for a text that stands for two ids: one of them could be neither written nor read."""
    ids: dict[str, int] = {}
    for id_, token in enumerate(tokens):
        if ids.setdefault(token, id_) != id_:
            raise UserError(f"{source}: token {token!r:.80} has ids {ids[token]} and {id_}; expected one")


def _check(pieces: Pieces, source: str) -> None:
    check_vocabulary(pieces.tokens, source)
    for id_, (token, score) in enumerate(zip(pieces.tokens, pieces.scores, strict=True)):
        if not math.isfinite(score):
            raise UserError(f"{source}: token {id_} ({token!r}) has score {score}; expected a number")
    if not 0 <= pieces.unknown < len(pieces.tokens):
        raise UserError(f"{source}: the unknown token is id {pieces.unknown}; expected one of {len(pieces.tokens)} tokens")


def _bpe(pieces: Pieces) -> models.BPE:
    """The vocabulary as BPE: every split of a piece into two pieces is a merge, and the piece's score ranks it."""
    ids = {token: i for i, token in enumerate(pieces.tokens)}
    mergeable = {token for token, kind in zip(pieces.tokens, pieces.kinds, strict=True) if kind in (Kind.NORMAL, Kind.USER_DEFINED)}
    merges = []
    for token, score in zip(pieces.tokens, pieces.scores, strict=True):
        if token in mergeable and len(token) <= _LONGEST_MERGED:
            splits = [(token[:cut], token[cut:]) for cut in range(1, len(token)) if token[:cut] in mergeable and token[cut:] in mergeable]
            splits.sort(key=lambda parts: (ids[parts[0]], ids[parts[1]]))
            merges += [(score, parts) for parts in splits]
    merges.sort(key=lambda merge: -merge[0])  # stable: equal scores stay in order
    return models.BPE(
        vocab=ids,
        merges=[parts for _, parts in merges],
        unk_token=pieces.tokens[pieces.unknown],
        fuse_unk=True,
        byte_fallback=Kind.BYTE in pieces.kinds,
        ignore_merges=pieces.cuts and Kind.USER_DEFINED in pieces.kinds,  # a piece that was cut out is one token
    )


def _unigram(pieces: Pieces) -> models.Unigram:
    scored = list(zip(pieces.tokens, pieces.scores, strict=True))
    return models.Unigram(vocab=scored, unk_id=pieces.unknown, byte_fallback=Kind.BYTE in pieces.kinds)


def _normalizer(pieces: Pieces) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(pieces.charsmap)] if pieces.charsmap else []
    if pieces.trims:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if pieces.prefix is Prefix.ALWAYS:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _pre_tokenizers(pieces: Pieces) -> list[pre_tokenizers.PreTokenizer]:
    steps: list[pre_tokenizers.PreTokenizer] = []
    if pieces.prefix is Prefix.FIRST:
        # For the first one the mark of a space is a space. So it finds none (they are SPACE by now), and adds one even to text that begins
        # with spaces, as SentencePiece does; the second one turns it into the mark.
        steps = [
            pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False),
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False),
        ]
    own = sorted(pieces.of_kind(Kind.USER_DEFINED), key=len, reverse=True) if pieces.cuts else []
    if own:
        steps.append(pre_tokenizers.Split(Regex("|".join(map(re.escape, own))), behavior="isolated"))
    return steps
