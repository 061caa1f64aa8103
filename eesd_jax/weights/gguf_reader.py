"""Opens GGUF files: one, or all parts of one that is split. What a file states of its own tensors is checked against its bytes here."""

import math
import pathlib
from typing import Any

import gguf

from eesd_jax.errors import UserError
from eesd_jax.weights.safetensors import NUMBERED, refuse_pointer


class Reader(gguf.GGUFReader):
    """The package's reader, but quick with long arrays (vocabularies have 100,000 strings and more), and clear about truncated files."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list, list[int], list[gguf.GGUFValueType]]:
        header = self.data[orig_offs : orig_offs + 12]  # of an array: the type of its items (uint32) and how many there are (uint64)
        order = "little" if self.endianess == gguf.GGUFEndian.LITTLE else "big"
        item_type = int.from_bytes(header[:4], order)
        if raw_type != gguf.GGUFValueType.ARRAY or item_type == gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        types = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(item_type)]
        count, start = int.from_bytes(header[4:], order), orig_offs + 12
        if item_type != gguf.GGUFValueType.STRING:
            values = self._get(start, self.gguf_scalar_to_np[types[1]], count)
            if len(values) < count:
                raise ValueError(f"it ends within an array of {count} values")
            return start + values.nbytes - orig_offs, [values], [0], types
        file, strings, end = memoryview(self.data), [], start
        for _ in range(count):
            begin = end + 8
            end = begin + int.from_bytes(file[begin - 8 : begin], order)
            if end > len(file):
                raise ValueError(f"it ends within an array of {count} strings")
            strings.append(file[begin:end])
        return end - orig_offs, strings, list(range(count)), types

    def _build_tensors(self, start_offs: int, fields: list[gguf.ReaderField]) -> None:
        if self.byte_order == "S":
            raise UserError("its numbers are in the byte order of other machines; expected a file made for this one")
        expected = 0
        for field in fields:
            _, name, _, dims, kind, offset = field.parts
            name, block, block_bytes = bytes(name).decode(), *gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(int(kind[0]))]
            size = math.prod(int(dim) for dim in dims) // block * block_bytes  # in Python's numbers, which do not run over
            if int(offset[0]) != expected:
                raise UserError(f"tensor {name} begins at byte {int(offset[0])} of the data; expected {expected}, behind the one before it")
            end = start_offs + expected + size
            if end > len(self.data):
                raise UserError(f"tensor {name} ends at byte {end}, the file has {len(self.data)}: it is truncated")
            expected += -(-size // int(self.alignment)) * int(self.alignment)
        super()._build_tensors(start_offs, fields)


def open_file(path: pathlib.Path) -> Reader:
    """Opens one file; UserError where it is none, or truncated."""
    try:
        return Reader(path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, IndexError, KeyError, OverflowError, RecursionError, OSError) as error:
        refuse_pointer(path)
        raise UserError(f"{path}: truncated or not a GGUF file ({path.stat().st_size} bytes; {error})") from None


def open_parts(path: pathlib.Path, part: Any, parts: Any) -> list[Reader]:
    """All parts of a split file, by the names that llama.cpp gives them."""
    match = NUMBERED.fullmatch(path.stem)
    if (
        not match
        or not isinstance(part, int)
        or not isinstance(parts, int)
        or (int(match["part"]) - 1, int(match["parts"])) != (part, parts)
    ):
        shown = f"part {part + 1 if isinstance(part, int) else part} of {parts} of a split GGUF"
        raise UserError(
            f"{path}: {shown}; expected its parts beside each other, with the names that they were made with: NAME-00001-of-..."
        )
    files = [path.with_name(f"{match['stem']}-{i:05d}-of-{parts:05d}{path.suffix}") for i in range(1, parts + 1)]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: part is missing; expected all {parts} parts of the split GGUF beside {path.name}")
    readers = [open_file(file) for file in files]
    for i, (file, reader) in enumerate(zip(files, readers, strict=True)):
        found = [field and field.contents() for field in (reader.fields.get("split.no"), reader.fields.get("split.count"))]
        if found != [i, parts]:
            raise UserError(f"{file}: says that it is part {found[0]} of {found[1]} (counted from 0); expected {i} of {parts}")
    total, counted = readers[0].fields.get("split.tensors.count"), sum(len(reader.tensors) for reader in readers)
    if total and total.contents() != counted:
        raise UserError(f"{path}: its parts have {counted} tensors; expected {total.contents()}")
    return readers
