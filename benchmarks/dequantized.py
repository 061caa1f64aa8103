"""A GGUF file with the same weights as another one, in float32 or bfloat16: for programs that multiply by them as they are stored."""

import pathlib

import gguf

_FILE_TYPES = {
    gguf.GGMLQuantizationType.F32: gguf.LlamaFileType.ALL_F32,
    gguf.GGMLQuantizationType.BF16: gguf.LlamaFileType.MOSTLY_BF16,
}


def write(source: pathlib.Path, target: pathlib.Path, kind: gguf.GGMLQuantizationType) -> None:
    """Writes `source` once more, with its matrices in float32 or bfloat16; vectors (norms) are float32 in both, as llama.cpp has them."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        # What the writer writes by itself.
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type", "general.quantization_version"):
            value_type = field.types[0]
            writer.add_key_value(name, field.contents(), value_type, field.types[-1] if len(field.types) > 1 else None)
    writer.add_file_type(_FILE_TYPES[kind])
    for tensor in reader.tensors:
        data = gguf.dequantize(tensor.data, tensor.tensor_type)
        of_kind = kind if data.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quantize(data, of_kind), raw_dtype=of_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
