"""Measures what each process of a pod reads of a checkpoint, and how much host memory that takes: Llama-2-13B's shape, in bfloat16.

    python benchmarks/loading.py --processes=8 --mesh=fsdp:8
    python benchmarks/loading.py --processes=4 --mesh=fsdp:2,tensor:4 --only=0

The file is sparse: a header, and nothing after it, so it takes no disk; reading it gives zeros. Processes run one after the other, because
a machine need not have the memory for all of them. Each has all devices of the mesh, virtual ones, loads through the library's own code,
and keeps what its own devices would hold. Traffic between devices is left out; `tests/weights/test_weights.py` loads in real processes.

"Read" counts the bytes asked of the file. "Memory" is the peak above what the process had before. It leaves out the pages of the file that
the kernel keeps and takes back when it needs them; these are shown beside it.
"""

import json
import math
import os
import pathlib
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from absl import flags

from eesd_jax import cli
from eesd_jax.bench import report
from eesd_jax.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_list("mesh", ["fsdp:8"], "As for infer/generate.py.")
flags.DEFINE_integer("processes", 8, "How many share the devices of the mesh, each as many, in order.")
flags.DEFINE_list("only", [], "Which of them are run; default: all.")
flags.DEFINE_integer("blocks", 40, "Of the model, which otherwise has the shape of Llama-2-13B.")
flags.DEFINE_string("folder", None, "The checkpoint; default: a sparse one is made.")
GIB = 2**30


class Loaded(NamedTuple):
    """The bytes of one process.

    read: of the file. share: what its devices hold. memory, mapped: peaks of its own memory, and of the file's.
    """

    read: int
    share: int
    memory: int = 0
    mapped: int = 0


def mesh_sizes() -> dict[str, int]:
    """Parses --mesh into sizes by axis; raises UserError where it makes no sense."""
    try:
        return {axis: int(size) for axis, size in (entry.split(":") for entry in FLAGS.mesh)}
    except ValueError:
        raise UserError(f"--mesh is {','.join(FLAGS.mesh)!r}; expected AXIS:SIZE, as in fsdp:2,tensor:4") from None


def hf_config(blocks: int) -> dict[str, Any]:
    """Returns the `config.json` of Llama-2-13B."""
    return {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 5120,
        "num_hidden_layers": blocks,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "intermediate_size": 13824,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }


def write_sparse(folder: pathlib.Path, hf: dict[str, Any]) -> None:
    """Writes a model's folder without a tokenizer, whose weights are bfloat16 zeros that take no disk."""
    import flax.linen as nn
    import jax

    from eesd_jax.model import sharding
    from eesd_jax.model.config import ModelConfig
    from eesd_jax.weights import load

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf))
    abstract = nn.meta.unbox(sharding.abstract_params(ModelConfig.from_hf(hf, "sparse")))
    header, end = {}, 0
    for name, leaf in zip(jax.tree.leaves(load._source_names(abstract)), jax.tree.leaves(abstract), strict=True):
        header[name] = {"dtype": "BF16", "shape": list(leaf.shape), "data_offsets": [end, end + 2 * leaf.size]}
        end += 2 * leaf.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + end)


def load_as(process: int, processes: int, folder: pathlib.Path, sizes: dict[str, int]) -> tuple[Loaded, Any]:
    """Loads what one of several processes would, in bfloat16; also returns its arrays, to be kept while memory is measured."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh

    from eesd_jax.model.config import ModelConfig
    from eesd_jax.model.sharding import make_mesh
    from eesd_jax.weights import load, safetensors

    mesh = make_mesh(**sizes)
    each = mesh.size // processes
    own = list(mesh.devices.flat)[process * each : (process + 1) * each]
    read, held = [], []

    class Parts(NamedTuple):
        """Stands in for an array whose other parts are on other processes."""

        arrays: list[jax.Array]

        def block_until_ready(self) -> "Parts":
            return Parts(jax.block_until_ready(self.arrays))

    def make(shape: tuple[int, ...], placement: jax.sharding.Sharding, part: Callable[..., Any]) -> Parts:
        indices = placement.devices_indices_map(shape)
        parts = Parts([jax.device_put(part(indices[device]), device) for device in own])
        held.append(sum(array.nbytes for array in parts.arrays))
        return parts

    def get(tensor: safetensors.StoredTensor, index: tuple[slice, ...]) -> Any:
        values = stored_get(tensor, index)
        read.append(values.nbytes)
        return values

    source, config = safetensors.SafetensorsSource(folder), ModelConfig.from_hf(safetensors.read_json(folder / "config.json"), str(folder))
    stored_get = safetensors.StoredTensor.__getitem__
    replaced = [
        (jax, "make_array_from_callback", make),
        (load, "_move", lambda parts, placement: parts),
        # A property, which counts more than what a mesh of these devices may have found of itself before.
        (Mesh, "is_multi_process", property(lambda _: True)),
        (safetensors.StoredTensor, "__getitem__", get),
    ]
    before = [getattr(owner, name) if owner is not Mesh else Mesh.__dict__[name] for owner, name, _ in replaced]
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        params = load.load_params(config, source, jnp.dtype("bfloat16"), mesh)
    finally:
        for (owner, name, _), value in zip(replaced, before, strict=True):
            setattr(owner, name, value)
    return Loaded(sum(read), sum(held)), params


def memory_in_use() -> tuple[int, int]:
    """Reads this process's memory, in bytes: its own, and pages of files."""
    lines = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))


def measure(process: int, folder: pathlib.Path, sizes: dict[str, int]) -> Loaded:
    """Runs `load_as` in this process, and measures the peaks of its memory above what it had before."""
    import jax

    from eesd_jax.weights import load  # noqa: F401  which is none of what a checkpoint takes

    jax.block_until_ready(jax.device_put(0))
    before, peaks, done = memory_in_use(), [0, 0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            now = memory_in_use()
            peaks[:] = [max(peak, value - start) for peak, value, start in zip(peaks, now, before, strict=True)]

    watcher = threading.Thread(target=watch)
    watcher.start()
    loaded, params = load_as(process, FLAGS.processes, folder, sizes)
    done.set()
    watcher.join()
    del params
    return loaded._replace(memory=peaks[0], mapped=peaks[1])


def rows(results: dict[int, Loaded]) -> Iterator[list[str]]:
    for process, loaded in results.items():
        sizes = [f"{value / GIB:.3f}" for value in loaded]
        yield [str(process), *sizes, f"{loaded.memory / loaded.share:.3f}"]


def main(argv: Sequence[str]) -> None:
    del argv
    sizes = mesh_sizes()
    devices = math.prod(sizes.values())
    if FLAGS.processes < 1 or devices % FLAGS.processes:
        raise UserError(f"--processes is {FLAGS.processes} for {devices} devices; expected a number that divides them")
    if FLAGS.folder is not None and len(FLAGS.only) == 1:
        print(json.dumps(measure(int(FLAGS.only[0]), pathlib.Path(FLAGS.folder), sizes)))
        return
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(FLAGS.folder or temporary)
        if FLAGS.folder is None:
            write_sparse(folder, hf_config(FLAGS.blocks))
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        for process in map(int, FLAGS.only or range(FLAGS.processes)):
            command = [sys.executable, __file__, f"--mesh={','.join(FLAGS.mesh)}", f"--processes={FLAGS.processes}"]
            command += [f"--folder={folder}", f"--only={process}"]
            out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[process] = Loaded(*json.loads(out.splitlines()[-1]))
        file = (folder / "model.safetensors").stat().st_size
    print(f"checkpoint: {file / GIB:.3f} GiB; mesh {','.join(FLAGS.mesh)}; {FLAGS.processes} processes; GiB:\n")
    columns = ["process", "read", "its share", "peak memory", "pages of the file", "memory / share"]
    print(report.table(columns, list(rows(results))))


if __name__ == "__main__":
    cli.run(main)
