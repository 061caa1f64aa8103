"""Writes the weights of a GGUF file to another one, in float32 or bfloat16: for programs that multiply weights as they are stored.

python benchmarks/dequantized.py --model=demo --output=demo-float32.gguf
"""

import pathlib
from collections.abc import Sequence

import gguf
from absl import flags

from eesd_jax import cli, files
from eesd_jax.errors import UserError
from eesd_jax.weights import hub

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


def main(argv: Sequence[str]) -> None:
    del argv
    model, output = flags.FLAGS.model, flags.FLAGS.output
    if not output:
        raise UserError("--output is missing; expected a file to write")
    if model != hub.DEMO_NAME and not model.endswith(".gguf"):
        raise UserError(f"--model is {model!r}; expected {hub.DEMO_NAME} or a .gguf file")
    try:
        with files.replaced(files.expand(output)) as partial:
            write(hub.find_model(model), partial, gguf.GGMLQuantizationType.F32)
    except OSError as error:
        raise UserError(
            f"cannot write --output={output!r} ({error.strerror}); expected a file in a folder that can be written to"
        ) from None


if __name__ == "__main__":
    flags.DEFINE_string("model", hub.DEMO_NAME, "A GGUF file, or the built-in model.")
    flags.DEFINE_string("output", None, "The file to write, with all matrices in float32.")
    cli.run(main)
