"""Training examples: token ids, and which of them the target wrote; as a tfds dataset on disk, or as a JSONL file of chats.

A dataset is a folder in the format of tfds (array_record files, readable with `tfds.builder_from_directory`; neither writing nor reading
needs TensorFlow). Its metadata says where it comes from: model, weights, tokenizer, settings. A file of chats: see `chats.py`.
"""

import hashlib
import itertools
import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from transformers import PreTrainedTokenizerBase

from eesd_jax.distill import chats
from eesd_jax.distill.example import Example, Target, show
from eesd_jax.errors import UserError
from eesd_jax.weights.branch_folder import config_hash

DATASET_NAME = "self_generated"
SPLITS = ("train", "validation")

_VERSION = "1.0.0"
_INFO_FILE = "dataset_info.json"  # without it a folder is no dataset
_EXAMPLES_PER_FILE = 10_000
_FILE_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"


class Source(NamedTuple):
    """The examples of one split.

    name: for messages. examples: random access. provenance: of a dataset, what its metadata says; of chats, their file and the tokenizer.
    """

    name: str
    examples: Sequence[Example]
    provenance: dict[str, Any]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what every id stands for: the same for one vocabulary read from a GGUF file and from a Hugging Face folder."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def held_out(prompt_ids: Sequence[int] | np.ndarray, share: float) -> bool:
    """Whether a prompt belongs to the validation split; depends on the prompt alone, so all its responses are on one side."""
    return _place(prompt_ids) < share


def assign_splits(prompts: Sequence[Sequence[int] | np.ndarray], share: float) -> list[str]:
    """The split of each prompt: by hash, but where there are prompts enough, and a share of either, neither split is left empty."""
    places = [_place(prompt) for prompt in prompts]
    cut = share
    if 0 < share < 1 and len(set(places)) > 1:
        cut = min(max(share, math.nextafter(min(places), 1)), max(places))
    return [SPLITS[place < cut] for place in places]


def _place(prompt_ids: Sequence[int] | np.ndarray) -> float:
    """A uniform number in [0, 1) from a hash."""
    digest = hashlib.sha256(np.asarray(prompt_ids, "<i4").tobytes()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _features() -> tfds.features.FeaturesDict:
    return tfds.features.FeaturesDict(
        {
            "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32),
            "response": tfds.features.Tensor(shape=(None,), dtype=np.bool_),
            "index": np.int64,
            "temperature": np.float32,
            "prompt_id": tfds.features.Text(),
        }
    )


def dataset_exists(folder: epath.PathLike) -> bool:
    return (epath.Path(folder) / _INFO_FILE).exists()


def write_dataset(folder: epath.PathLike, splits: dict[str, Iterable[dict[str, Any]]], provenance: dict[str, Any]) -> None:
    """Writes a dataset, which appears under its name only when it is complete.

    Args:
      folder: must not be a dataset yet; local or remote.
      splits: records of each split: tokens, response, index, temperature, prompt_id (see `_features`). Splits without records are left out.
      provenance: for the metadata; JSON.

    Raises:
      UserError: it cannot be written there.
    """
    folder = epath.Path(folder)
    try:
        _write_whole(folder, splits, provenance)
    except OSError as error:
        raise UserError(f"dataset {os.fspath(folder)!r} cannot be written ({error}); expected a folder that is not there yet") from None


def _write_whole(folder: epath.Path, splits: dict[str, Iterable[dict[str, Any]]], provenance: dict[str, Any]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Array records are written by C++, to local files; beside a local target, so that the rename stays within one file system.
    is_local = "://" not in os.fspath(folder)
    prefix = f".{folder.name}-partial-"
    if is_local:
        for leftover in folder.parent.glob(f"{prefix}*"):  # of a run that was killed
            leftover.rmtree()
    with tempfile.TemporaryDirectory(dir=folder.parent if is_local else None, prefix=prefix) as name:
        partial = epath.Path(name) / "dataset"  # in a folder of its own, because the outer one is made for its owner alone
        partial.mkdir()
        _write_local(os.fspath(partial), splits, provenance)
        if is_local:
            os.rename(partial, folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(partial.iterdir(), key=lambda path: path.name == _INFO_FILE):  # that one vouches for the others
                file.copy(folder / file.name, overwrite=True)


def _write_local(folder: str, splits: dict[str, Iterable[dict[str, Any]]], provenance: dict[str, Any]) -> None:
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=DATASET_NAME, version=tfds.core.Version(_VERSION), data_dir=folder, module_name=__name__, config_name=None
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=_features(),
        description="Text that a model wrote itself, to train its exit branch on: token ids, and which of them the model wrote.",
        metadata=tfds.core.MetadataDict(provenance=provenance),
    )
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    # Splits without examples are left out: tfds gives an error for them.
    info.set_splits(tfds.core.splits.SplitDict([found for split in splits if (found := _write_split(folder, split, splits[split], info))]))
    info.write_to_directory(folder)


def _write_split(
    folder: str, split: str, records: Iterable[dict[str, Any]], info: tfds.core.DatasetInfo
) -> tfds.core.splits.SplitInfo | None:
    """Writes a split's files; None where there are no records.

    As `tfds.core.SequentialWriter` does, except that the same records always give the same bytes: maps in protobufs have no order.
    """
    serializer = tfds.core.example_serializer.ExampleSerializer(info.features.get_serialized_info())
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=DATASET_NAME, split=split, filetype_suffix="array_record", template=_FILE_TEMPLATE
    )
    lengths, num_bytes, records = [], 0, iter(records)
    while some := list(itertools.islice(records, _EXAMPLES_PER_FILE)):
        writer = ArrayRecordWriter(os.fspath(template.sharded_filepath(shard_index=len(lengths), num_shards=None)), "group_size:1")
        for record in some:
            line = serializer.get_tf_example(info.features.encode_example(record)).SerializeToString(deterministic=True)
            writer.write(line)
            num_bytes += len(line)
        writer.close()
        lengths.append(len(some))
    if not lengths:
        return None
    return tfds.core.splits.SplitInfo(name=split, shard_lengths=lengths, num_bytes=num_bytes, filename_template=template)


def open_source(path: str, split: str, model: Target, validation_share: float) -> Source:
    """Opens a dataset's folder or a file of chats.

    Args:
      path: local or remote.
      split: "train" or "validation".
      validation_share: of a file of chats; a dataset is split already.

    Raises:
      UserError: nothing there, not what is expected, or made with another tokenizer or vocabulary (the decoded example is shown).
    """
    folder = epath.Path(path).expanduser()
    try:
        if folder.is_file():
            return _open_chats(folder, split, model, validation_share)
        if not dataset_exists(folder):
            raise UserError(
                f"dataset {path!r}: {'this folder holds no dataset' if folder.is_dir() else 'no such folder'}; "
                "expected one that train/self_generate.py has written, or a JSONL file of chats"
            )
        return _open_dataset(folder, split, model)
    except (OSError, ImportError) as error:  # ImportError: what etils would read that address with is not installed
        raise UserError(f"dataset {path!r} cannot be read ({error})") from None


class _DatasetExamples(Sequence[Example]):
    """Examples of one split of a tfds dataset, read when they are asked for; UserError for one that is damaged."""

    def __init__(self, source: Sequence[dict[str, Any]], where: str):
        self._source, self._where = source, where

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self._source):
            raise IndexError(index)
        try:
            record = self._source[index]
            return Example(record["tokens"], record["response"], int(record.get("index", -1)))
        except Exception as error:  # whatever the readers of records and of examples raise
            raise UserError(f"{self._where}, example {index} cannot be read ({_one_line(error)}); expected a complete copy") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _open_dataset(folder: epath.Path, split: str, model: Target) -> Source:
    name = os.fspath(folder)
    _check_format(folder)
    foreign = f"dataset {name!r} was not written by train/self_generate.py"
    try:
        builder = tfds.builder_from_directory(name)
        provenance = (builder.info.metadata or {}).get("provenance")
        fields = set(builder.info.features or ())
    except Exception as error:  # whatever tfds and its parsers raise
        raise UserError(f"dataset {name!r} cannot be read ({_one_line(error)}); expected a complete copy") from None
    if not isinstance(provenance, dict) or not {"tokens", "response"} <= fields:
        raise UserError(f"{foreign} (its fields are {', '.join(sorted(fields))}); expected tokens, response, and metadata of their origin")
    try:
        # tfds gives an error for a split without examples.
        filled = split in builder.info.splits and builder.info.splits[split].num_examples
        examples = _DatasetExamples(builder.as_data_source(split), f"dataset {name!r}, split {split!r}") if filled else []
        sample = examples[0] if filled else None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"dataset {name!r}, split {split!r} cannot be read ({_one_line(error)}); expected a complete copy") from None
    _check_provenance(name, provenance, sample, model)
    return Source(name, examples, provenance)


def _check_format(folder: epath.Path) -> None:
    """Raises UserError for a dataset in files that only TensorFlow reads, of which tfds would say much in its own words."""
    try:
        info = json.loads((folder / _INFO_FILE).read_text())
        kind = info.get("fileFormat") or info.get("file_format")
    except (ValueError, RecursionError, AttributeError) as error:
        raise UserError(f"dataset {os.fspath(folder)!r} cannot be read ({_one_line(error)}); expected a complete copy") from None
    if kind != "array_record":
        raise UserError(f"dataset {os.fspath(folder)!r} is in files of format {kind!r:.80}; expected 'array_record'")


def _open_chats(path: epath.Path, split: str, model: Target, validation_share: float) -> Source:
    conversations = chats.read(path, model)
    # All turns of a conversation are on one side: each of them has those before it in its prompt.
    splits = assign_splits([examples[0].prompt for examples in conversations], validation_share)
    chosen = [example for examples, its_split in zip(conversations, splits, strict=True) if its_split == split for example in examples]
    provenance = {
        "chats": os.fspath(path),
        "vocab_size": model.config.vocab_size,
        "tokenizer_hash": tokenizer_hash(model.tokenizer),
        "validation_share": validation_share,
    }
    return Source(os.fspath(path), chosen, provenance)


def _check_provenance(name: str, provenance: dict[str, Any], sample: Example | None, model: Target) -> None:
    shown = f"; read with this model's tokenizer, an example is {show(sample, model.tokenizer)}" if sample else ""
    vocab_size, ours = provenance.get("vocab_size"), model.config.vocab_size
    author = f"dataset {name!r} was written by model {provenance.get('model')!r}"
    if vocab_size != ours:
        raise UserError(f"{author} with a vocabulary of {vocab_size} tokens; expected {ours}, that of this model{shown}")
    if provenance.get("tokenizer_hash") != tokenizer_hash(model.tokenizer):
        raise UserError(f"{author} with another tokenizer (the same ids stand for other text); expected this model's{shown}")
    if provenance.get("target_config_hash") != config_hash(model.config):
        warnings.warn(f"{author}, which has another shape than this one: what it wrote is not what this model would write", stacklevel=2)


def check_example(example: Example, name: str, index: int, model: Target) -> None:
    """Raises UserError, showing the example, for one that cannot be trained on: no response, or ids that are no tokens."""
    problem = None
    if example.tokens.ndim != 1 or example.tokens.shape != example.response.shape:
        problem = f"{example.tokens.shape} tokens and a response mask of {example.response.shape}; expected one each"
    elif not example.response.any():
        problem = "its response mask is empty; expected tokens that the model wrote"
    elif example.tokens.min() < 0 or example.tokens.max() >= model.config.vocab_size:
        wrong = next(int(token) for token in example.tokens if not 0 <= token < model.config.vocab_size)
        problem = f"token id {wrong} is outside the vocabulary; expected 0 to {model.config.vocab_size - 1}"
    if problem:
        raise UserError(f"dataset {name!r}, example {index}: {problem}; it reads {show(example, model.tokenizer)}")
