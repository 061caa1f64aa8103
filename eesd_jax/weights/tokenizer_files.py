"""The tokenizer of a Hugging Face folder, made of its files alone.

`tokenizer.json` comes first, as in transformers: it is what the model was trained with, and is loaded as it stands (transformers 5 would
rebuild it by the model's type, with other tokens for some texts). A folder with
`tokenizer.model` alone (Vicuna) is read as SentencePiece has it. Beside them, `tokenizer_config.json`, `special_tokens_map.json` and
`added_tokens.json` name special tokens, further tokens, and the chat template.
"""

import json
import pathlib
import warnings
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, processors

from eesd_jax.errors import UserError
from eesd_jax.weights import safetensors, sentencepiece
from eesd_jax.weights.sentencepiece import Kind, Prefix

if TYPE_CHECKING:  # it takes as long as JAX to import, and nothing needs it before a model is loaded
    from transformers import PreTrainedTokenizerFast

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token", "eot_token", "eom_token")
_UNKNOWN = "a \U0010fffe"  # a character that no vocabulary has
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def load(folder: pathlib.Path) -> "PreTrainedTokenizerFast":
    """Loads the tokenizer of a folder.

    Raises:
      UserError: there is none, or one that cannot be read.
    """
    present = [name for name in _VOCABULARY_FILES if (folder / name).exists()]
    if not present:
        raise UserError(f"{folder}: no tokenizer in this folder; expected {' or '.join(_VOCABULARY_FILES)}")
    safetensors.refuse_pointer(folder / present[0])
    settings = _Settings(folder)
    try:
        if present[0] == "tokenizer.json":
            core = Tokenizer.from_file(str(folder / "tokenizer.json"))
        elif present[0] == "tokenizer.model":
            core = _from_sentencepiece(folder / "tokenizer.model", settings)
        else:
            from transformers import AutoTokenizer

            core = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).backend_tokenizer
        _check_templates(core, folder)
        core.encode(_UNKNOWN)  # some files name a token for it that they do not have
        core.no_truncation()  # some files were saved with what they were trained with
        core.no_padding()
        return _complete(core, settings)
    except (UserError, KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # the tokenizers library raises bare Exceptions, and panics of Rust, which are none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: the tokenizer in this folder cannot be loaded ({reason})") from None


def _check_templates(core: Tokenizer, folder: pathlib.Path) -> None:
    """Raises UserError where what is put around a text has tokens that the file does not define: the library would panic at each text."""
    state = json.loads(core.post_processor.__getstate__()) if core.post_processor else {}
    for step in state.get("processors", [state]):
        defined = step.get("special_tokens") if step.get("type") == "TemplateProcessing" else None
        for piece in [*step.get("single", []), *step.get("pair", [])] if isinstance(defined, dict) else []:
            name = piece.get("SpecialToken", {}).get("id")
            if name is not None and name not in defined:
                raise UserError(f"{folder}: the template of tokenizer.json puts {name!r:.80} around texts, which it does not define")


class _Settings:
    """What stands beside the vocabulary.

    Attributes:
      folder: of the files.
      special: the text of each special token, by its name in transformers.
      extra: texts of further special tokens.
      added: tokens added to the vocabulary, by id.

    Raises:
      UserError: a file that is not what it must be; the message names it.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self._config = self._read("tokenizer_config.json")
        named = self._named()
        self.special = {name: text for name in _SPECIAL if (text := self._text(named.get(name), name)) is not None}
        extra = named.get("additional_special_tokens") or named.get("extra_special_tokens") or []
        extra = [self._text(token, "additional_special_tokens") for token in (extra if isinstance(extra, list) else [])]
        self.extra = [text for text in extra if text is not None]
        self.added = self._added()

    def _named(self) -> dict[str, Any]:
        """What names special tokens: as in transformers the map comes first beside a config that does not list the tokens themselves."""
        config = {name: value for name, value in self._config.items() if value is not None}
        mapped = self._read("special_tokens_map.json")
        return mapped | config if "added_tokens_decoder" in config else config | mapped

    def _read(self, name: str) -> dict[str, Any]:
        return safetensors.read_json(self.folder / name) if (self.folder / name).exists() else {}

    def _text(self, token: Any, name: str) -> str | None:
        content = token.get("content") if isinstance(token, dict) else token
        if token is None or content == "":  # so the first conversions of Llama say that there is none
            return None
        if not isinstance(content, str):
            raise UserError(f"{self.folder}: {name} of the tokenizer is {token!r:.80}; expected a text, or an object with 'content'")
        return content

    def _added(self) -> dict[int, AddedToken]:
        found = {}
        special = {*self.special.values(), *self.extra}
        if tokens := self._config.get("added_tokens_decoder"):
            entries = tokens.items() if isinstance(tokens, dict) else [(tokens, None)]
            entries = [(id_, token if isinstance(token, dict) else {}) for id_, token in entries]
        else:
            entries = [(id_, {"content": text, "special": text in special}) for text, id_ in self._read("added_tokens.json").items()]
        for id_, token in entries:
            content, flags = token.get("content"), {name: token[name] for name in _FLAGS if name in token}
            if (
                not str(id_).isdecimal()
                or not content
                or not isinstance(content, str)
                or not all(isinstance(x, bool) for x in flags.values())
            ):
                raise UserError(f"{self.folder}: added token {id_!r:.80} is {token!r:.80}; expected an id, and a text")
            found[int(id_)] = AddedToken(content, **{"normalized": not flags.get("special", False)} | flags)
        return dict(sorted(found.items()))

    @property
    def adds_bos(self) -> bool | None:
        """Whether a text begins with its special token, where these files decide on it: those of Llama's own tokenizers do."""
        told = self._config.get("add_bos_token")
        is_llama = str(self._config.get("tokenizer_class", "")).startswith(("Llama", "CodeLlama"))
        return told if is_llama and isinstance(told, bool) else None

    @property
    def prefix(self) -> Prefix:
        """Where SentencePiece's space goes; `legacy`, which transformers assumes, puts it also behind every special token."""
        if self._config.get("add_prefix_space") is False:
            return Prefix.NEVER
        return Prefix.FIRST if self._config.get("legacy") is False else Prefix.ALWAYS

    def chat_template(self) -> str | dict[str, str] | None:
        """The template of a file of its own, else that of `tokenizer_config.json`, which may be several by name."""
        path = self.folder / "chat_template.jinja"
        if path.exists():
            try:
                return path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path}: cannot be read ({error}); expected a chat template in UTF-8") from None
        template = self._config.get("chat_template") or self._read("chat_template.json").get("chat_template")
        if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
            template = {entry.get("name"): entry.get("template") for entry in template}
        texts = template.values() if isinstance(template, dict) else [template]
        if not all(isinstance(text, str) or (text is None and text is template) for text in texts):
            raise UserError(f"{self.folder}: chat_template of the tokenizer is {template!r:.80}; expected a text, or several with names")
        return template


def _from_sentencepiece(path: pathlib.Path, settings: _Settings) -> Tokenizer:
    pieces = sentencepiece.read_model(path, settings.prefix)
    tokens, kinds = list(pieces.tokens), list(pieces.kinds)
    for id_, token in settings.added.items():
        if id_ < len(tokens) and token.content not in tokens:  # in a place that was kept free for it
            tokens[id_], kinds[id_] = token.content, Kind.UNUSED
    core = sentencepiece.build(pieces._replace(tokens=tokens, kinds=kinds), str(path))
    settings.added = {id_: _as_it_is(token) for id_, token in settings.added.items()}
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": tokens[pieces.unknown]}
    for name, text in ends.items():
        if text in tokens:
            settings.special.setdefault(name, text)
    _add_bos(core, settings, settings.adds_bos is not False)
    return core


def _as_it_is(token: AddedToken) -> AddedToken:
    """The token, looked for in the text before it is normalised: with the space that is put before text it would never be found."""
    return AddedToken(token.content, **{name: getattr(token, name) for name in _FLAGS} | {"normalized": False})


def _complete(core: Tokenizer, settings: _Settings) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    known, left_out = core.get_added_tokens_decoder(), []
    for id_, token in settings.added.items():
        found = core.token_to_id(token.content)
        if id_ == (core.get_vocab_size() if found is None else found):
            if id_ not in known:
                core.add_tokens([token])
        elif found is None:
            left_out.append(f"{token.content!r:.80} is to be id {id_}")
    if left_out:
        told = f"{len(left_out)} added tokens are left out, since the vocabulary has {core.get_vocab_size()} tokens and ids follow it"
        warnings.warn(f"{settings.folder}: {told}; the first, {left_out[0]}", stacklevel=2)
    added = {token.content: token for token in core.get_added_tokens_decoder().values()}
    for text in [*settings.special.values(), *settings.extra]:
        if text in added and not added[text].special:
            core.add_special_tokens([AddedToken(text, **{name: getattr(added[text], name) for name in _FLAGS} | {"special": True})])
    if settings.adds_bos is not None:
        _add_bos(core, settings, settings.adds_bos)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        **settings.special,
        extra_special_tokens=[text for text in settings.extra if core.token_to_id(text) is not None],
        chat_template=settings.chat_template(),
        clean_up_tokenization_spaces=False,
    )


def _add_bos(core: Tokenizer, settings: _Settings, adds: bool) -> None:
    """Has texts begin with the BOS, or not, where they do not already."""
    bos = settings.special.get("bos_token")
    bos_id = None if bos is None else core.token_to_id(bos)
    if bos_id is None or (core.encode("a").ids[:1] == [bos_id]) == adds:
        return
    before = [bos] if adds else []
    core.post_processor = processors.TemplateProcessing(
        single=[*before, "$A"], pair=[*before, "$A", *before, "$B"], special_tokens=[(bos, bos_id)]
    )
