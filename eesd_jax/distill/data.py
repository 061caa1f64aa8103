"""What a training step reads: examples packed into rows of fixed length, shuffled globally, each process reading its own part.

rows = open_split(config.data, output_dir / "dataset", "train", model)
batches = make_loader(rows, batch_size=8, seed=0, process_index=0, process_count=1)
batch = next(batches); state = batches.get_state(); batches.set_state(state)

Packing is first planned from lengths alone, so it is the same on every process, and a row's index says what it holds. Global batch s is
the same rows in the same order for any number of processes; what a process reads of it is its own rows only.

Axes: B rows of this process, T tokens of a row, V vocabulary.
"""

import hashlib
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from etils import epath

from eesd_jax.config import DataConfig
from eesd_jax.distill import examples as ex
from eesd_jax.distill.examples import Example
from eesd_jax.errors import UserError

# Padded batches are cut to one of these parts of a row's length.
_BUCKETS = (8, 4, 2, 1)
_READING = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


class Batch(NamedTuple):
    """Rows of training text, numpy; without the axis B it is one row.

    tokens: int32 [B, T], 0 where padded. segments: int32 [B, T], 0 where padded, else 1, 2, ...: which example of the row.
    positions: int32 [B, T], from 0 within each example. loss_mask: bool [B, T], True at t where the token at t + 1 is of the same example
    and was written by the target: there the branch is to predict the target's distribution of it. row: int32 [B], index of the row.
    """

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    loss_mask: np.ndarray
    row: np.ndarray


class Rows(Sequence[Batch]):
    """The rows of one split: random access; a row is a `Batch` without the axis B.

    Attributes:
      name: where their source lies.
      examples: as they were written, uncut; random access.
      provenance: where they come from (see `examples.py`).
      num_tokens: in all rows, without padding. num_response_tokens: those of them that a loss is taken at.
      fingerprint: SHA-256 of all that the rows hold, in order.
      num_dropped: examples whose response lies behind `sequence_length`; they are in no row.

    Args:
      source: the examples.
      config: how rows are made.
      model: what the examples are checked against.

    Raises:
      UserError: an example that cannot be trained on; the message shows it.
    """

    def __init__(self, source: ex.Source, config: DataConfig, model: ex.Target):
        if config.sequence_length < 2:
            raise UserError(f"data.sequence_length is {config.sequence_length}; expected an integer >= 2")
        if config.max_examples < 0:
            raise UserError(f"data.max_examples is {config.max_examples}; expected an integer >= 0 (0 for all)")
        self.name = source.name
        self.examples = _First(source.examples, config.max_examples) if config.max_examples else source.examples
        self.provenance: dict[str, Any] = source.provenance
        self._config = config
        digest = hashlib.sha256(f"{config.sequence_length} {config.pack}".encode())
        length = config.sequence_length
        lengths = np.zeros(len(self.examples), np.int32)
        losses = np.zeros(len(self.examples), np.int32)
        for i, example in enumerate(self.examples):
            ex.check_example(example, source.name, i, model)
            lengths[i] = min(len(example.tokens), length)
            losses[i] = np.count_nonzero(example.response[1:length])
            digest.update(len(example.tokens).to_bytes(8, "little"))
            digest.update(example.tokens.astype("<i4").tobytes())
            digest.update(np.packbits(example.response).tobytes())
        self.fingerprint = digest.hexdigest()
        kept = np.flatnonzero(losses)
        self.num_dropped = len(lengths) - len(kept)
        if self.num_dropped:
            warnings.warn(
                f"dataset {source.name!r}: {self.num_dropped} of {len(lengths)} examples are left out: their response does not begin in "
                f"the first {length} tokens (data.sequence_length)",
                stacklevel=3,
            )
        self.num_tokens = int(lengths[kept].sum())
        self.num_response_tokens = int(losses[kept].sum())
        self._plan = pack(lengths[kept], length) if config.pack else [[i] for i in range(len(kept))]
        self._plan = [kept[row] for row in self._plan]
        self._widths = np.array([lengths[row].sum() for row in self._plan], np.int32)

    @property
    def parts(self) -> "tuple[Rows, ...]":
        """As of `JoinedRows`: itself."""
        return (self,)

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        length = self._config.sequence_length
        tokens, segments, positions = (np.zeros(length, np.int32) for _ in range(3))
        loss_mask = np.zeros(length, bool)
        start = 0
        for segment, example in enumerate(self.members(index), start=1):
            count = min(len(example.tokens), length)
            place = slice(start, start + count)
            tokens[place] = example.tokens[:count]
            segments[place] = segment
            positions[place] = np.arange(count)
            loss_mask[start : start + count - 1] = example.response[1:count]
            start += count
        return Batch(tokens, segments, positions, loss_mask, np.int32(index))

    def members(self, index: int) -> list[Example]:
        """Reads the examples of a row, in their order."""
        return [self.examples[int(i)] for i in self._plan[index]]

    def width(self, indices: np.ndarray) -> int:
        """How many tokens of those rows a batch has to hold: all of T where rows are packed, else the least bucket that is enough."""
        length = self._config.sequence_length
        if self._config.pack:
            return length
        longest = int(self._widths[indices].max())
        return next(size for size in (-(-length // parts) for parts in _BUCKETS) if size >= longest)


class Chain(Sequence[Any]):
    """Several sequences, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Any]]):
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def place(self, index: int) -> tuple[int, int]:
        """Which part an index lies in, and where in it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self.ends, index, side="right"))
        return part, index - int(self.ends[part]) + len(self.parts[part])

    def __getitem__(self, index: int) -> Any:
        part, here = self.place(index)
        return self.parts[part][here]


class JoinedRows(Chain):
    """The rows of several datasets, each packed by itself, so that what is known of a dataset's rows holds wherever it is read.

    Attributes: those of `Rows`, of all of them together; parts: the rows of each.
    """

    def __init__(self, parts: Sequence[Rows]):
        super().__init__(parts)
        self.examples = Chain([part.examples for part in parts])
        self.num_tokens = sum(part.num_tokens for part in parts)
        self.num_response_tokens = sum(part.num_response_tokens for part in parts)
        self.num_dropped = sum(part.num_dropped for part in parts)
        self.fingerprint = hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest()

    def __getitem__(self, index: int) -> Batch:
        return super().__getitem__(index)._replace(row=np.int32(index))

    def width(self, indices: np.ndarray) -> int:
        """As of `Rows`: enough for every part."""
        places = [self.place(int(index)) for index in indices]
        return max(self.parts[part].width(np.array([here])) for part, here in places)


class _First(Sequence[Example]):
    """The first so many examples."""

    def __init__(self, examples: Sequence[Example], count: int):
        self._examples = examples
        self._count = min(count, len(examples))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._examples[index]


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Puts items into bins of that capacity: best fit, the longest first (equal ones in order). Deterministic, and O(n log n).

    Args:
      lengths: int [n], each in [1, capacity].

    Returns:
      The items of each bin, by index, in the order in which they were put there; bins in the order in which they were opened.
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins by the room that is left
    rooms = 0  # bit r: there is a bin with room r
    for item in np.argsort(-lengths, kind="stable").tolist():
        need = int(lengths[item])
        if fitting := rooms >> need:
            room = need + (fitting & -fitting).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        with_room[room - need].append(chosen)
        rooms |= 1 << (room - need)
    return bins


def paths_of(config: DataConfig, default_path: epath.PathLike) -> list[str]:
    """The addresses of the data: one or several, with commas between them."""
    return (config.path or str(default_path)).split(",")


def open_split(config: DataConfig, default_path: epath.PathLike, split: str, model: ex.Target) -> Rows | JoinedRows:
    """The rows of a split; none where the split has no examples.

    Args:
      config: what to read and how to make rows of it.
      default_path: the dataset, where the config names none.
      split: "train" or "validation".
      model: whose tokenizer and vocabulary the text must be of (a `LoadedModel`; its params are not looked at).

    Raises:
      UserError: no dataset there, one of another tokenizer or vocabulary, an example without response or with ids that are no tokens.
    """
    if not 0 <= config.validation_share < 1:
        raise UserError(f"data.validation_share is {config.validation_share}; expected a number in [0, 1)")
    parts = [Rows(ex.open_source(path, split, model, config.validation_share), config, model) for path in paths_of(config, default_path)]
    return parts[0] if len(parts) == 1 else JoinedRows(parts)


def make_loader(rows: Rows | JoinedRows, batch_size: int, seed: int, process_index: int, process_count: int) -> grain.DatasetIterator:
    """An endless iterator of this process's rows of every global batch, with `get_state` and `set_state` (JSON).

    Every epoch is a new shuffle of all rows. Epochs follow without a gap, so a batch may hold rows of two, and where there are fewer rows
    than `batch_size` some are in it more than once. Rows that are padded, not packed, come cut to a width that the global batch needs.

    Args:
      rows: of one split.
      batch_size: rows of the global batch; process p of P has rows [p * B / P, (p + 1) * B / P) of it.
      seed: of the shuffles.

    Raises:
      UserError: no rows, or a batch that cannot be divided among the processes.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; expected an integer >= 1")
    if batch_size % process_count:
        raise UserError(f"batch_size is {batch_size}; expected a multiple of {process_count}, the number of processes")
    if not len(rows):
        raise UserError("there is no text to train on; expected a dataset with examples in this split")
    share = batch_size // process_count

    def read(indices: np.ndarray) -> Batch:
        width = rows.width(indices)
        own = [rows[int(i)] for i in indices[process_index * share : (process_index + 1) * share]]
        stacked = Batch(*(np.stack(field) for field in zip(*own, strict=True)))
        return Batch(*(field[:, :width] if field.ndim == 2 else field for field in stacked))

    # Numbers of rows are shuffled and batched, so that only this process's own rows are ever read.
    indices = grain.MapDataset.range(len(rows)).shuffle(seed=seed % 2**32).repeat().batch(batch_size, drop_remainder=True)
    return iter(indices.map(read).to_iter_dataset(_READING))


def token_counts(rows: Rows | JoinedRows, vocab_size: int) -> np.ndarray:
    """How often each token is to be predicted: int64 [V], over all positions of the rows that a loss is taken at."""
    counts = np.zeros(vocab_size, np.int64)
    for row in rows:
        counts += np.bincount(row.tokens[1:][row.loss_mask[:-1]], minlength=vocab_size)
    return counts
