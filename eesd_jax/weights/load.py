"""From a model's files to a `LoadedModel`: configuration, params placed on their devices, tokenizer.

Weights are read one tensor at a time and placed at once with their sharding, so the host never holds more than the model and one tensor.
"""

import contextlib
import ctypes
import math
import pathlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eesd_jax.config import NOT_QUANTIZED
from eesd_jax.errors import UserError
from eesd_jax.model import llama, ops, sharding, stored
from eesd_jax.model.config import ModelConfig
from eesd_jax.model.stored import Codes, Quantized
from eesd_jax.weights import end_tokens, gguf, hub, safetensors, tiny, tokenizer
from eesd_jax.weights import quantize as quantizing

if TYPE_CHECKING:  # it takes as long as JAX to import, and nothing needs it before a model is loaded
    from transformers import PreTrainedTokenizerBase

# Our name -> Hugging Face name. Every tensor is stored with just our shape.
_TOP_NAMES = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "lm_head": "lm_head.weight"}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm.weight",
    "wq": "self_attn.q_proj.weight",
    "wk": "self_attn.k_proj.weight",
    "wv": "self_attn.v_proj.weight",
    "wo": "self_attn.o_proj.weight",
    "bq": "self_attn.q_proj.bias",
    "bk": "self_attn.k_proj.bias",
    "bv": "self_attn.v_proj.bias",
    "bo": "self_attn.o_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "w_gate": "mlp.gate_proj.weight",
    "w_up": "mlp.up_proj.weight",
    "w_down": "mlp.down_proj.weight",
    "b_gate": "mlp.gate_proj.bias",
    "b_up": "mlp.up_proj.bias",
    "b_down": "mlp.down_proj.bias",
}
# Tensors that files carry without need: the tied head once more, and tables that are computed here.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)


class TensorSource(Protocol):
    """Where weights come from: `SafetensorsSource` or `GGUFSource`."""

    description: str
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> "Readable": ...


class Readable(Protocol):
    """A tensor in its stored dtype, in memory or in a file, of which parts are taken: a slice for each axis; UserError where it fails."""

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray: ...


class ModelText(NamedTuple):
    """What a model is without its weights.

    config: static shape. tokenizer: with the chat template, if there is one. eos_ids: ids that end a text.
    """

    config: ModelConfig
    tokenizer: "PreTrainedTokenizerBase"
    eos_ids: tuple[int, ...]


class LoadedModel(NamedTuple):
    """Everything that generation needs of a model.

    config, tokenizer, eos_ids: as in `ModelText`. params: as in `model/llama.py`; weights are `Stored` where kernels read their codes.
    quantize: how the matrices of blocks are quantised; one of `config.QUANTIZATIONS`.
    """

    config: ModelConfig
    params: llama.Params
    tokenizer: "PreTrainedTokenizerBase"
    eos_ids: tuple[int, ...]
    quantize: str = NOT_QUANTIZED


def load_model(name: str, dtype: jnp.dtype, mesh: Mesh | None = None, quantize: str = NOT_QUANTIZED) -> LoadedModel:
    """Finds, reads and places a model.

    Args:
      name: `demo`, a Hugging Face folder, a GGUF file, a hub id, or `tiny` (random, for trials).
      dtype: float32 or bfloat16, of the params and of the arithmetic.
      mesh: where the params go (see `model/sharding.py`); None for the default device.
      quantize: one of `config.QUANTIZATIONS`; weights that are quantised in their file already are quantised anew.

    Raises:
      UserError: anything about the name or the files that cannot be used.
    """
    text, source = _open(name)
    params = load_params(text.config, source, dtype, mesh, quantize)
    # In other arithmetic codes would not stand for the very weights.
    if mesh is None and dtype == jnp.float32 and ops.pack_codes.kernels():
        if quantize != NOT_QUANTIZED:
            params = llama.with_codes(text.config, params, quantized_codes(text.config, params))
        elif isinstance(source, gguf.GGUFSource):
            params = llama.with_codes(text.config, params, load_codes(text.config, source))
    return LoadedModel(text.config, params, text.tokenizer, text.eos_ids, quantize)


def load_text(name: str) -> ModelText:
    """As `load_model`, without reading the weights."""
    return _open(name)[0]


def _open(name: str) -> tuple[ModelText, TensorSource]:
    if name == tiny.TINY_NAME:
        config, text = tiny.config(), tiny.tokenizer()
        abstract = nn.meta.unbox(sharding.abstract_params(config))
        names, leaves = jax.tree.leaves(_source_names(abstract)), jax.tree.leaves(abstract)
        source = tiny.RandomSource({name: leaf.shape for name, leaf in zip(names, leaves, strict=True)})
        return ModelText(config, text, (text.eos_token_id,)), source
    path = hub.find_model(name)
    if path.is_file():
        source = gguf.GGUFSource(path)
        hf_config = source.hf_config()
        config = ModelConfig.from_hf(hf_config, str(path))
        text, eos_ids = tokenizer.from_gguf(source), hf_config["eos_token_id"]
    else:
        hf_config = safetensors.read_config(path)
        config = ModelConfig.from_hf(hf_config, str(path))
        source = safetensors.SafetensorsSource(path)
        text, eos_ids = tokenizer.from_folder(path), _folder_eos_ids(path, hf_config)
    _check_layers(config, source)
    # A tokenizer may have more tokens than the model (a pad token that training added): their use is refused, where text is encoded.
    return ModelText(config, text, end_tokens.end_ids(text, eos_ids, config.vocab_size)), source


def _check_layers(config: ModelConfig, source: TensorSource) -> None:
    """Raises UserError for layers that have no weights, before anything is made for each of them."""
    parts = [name.split(".") for name in source.shapes if name.startswith("model.layers.")]
    stored = len({layer for _, _, layer, *_ in parts})
    if config.num_layers > stored:
        raise UserError(f"{source.description}: num_hidden_layers is {config.num_layers}; its weights are of {stored} layers")


def _folder_eos_ids(folder: pathlib.Path, hf_config: dict) -> list[int]:
    generation = folder / "generation_config.json"
    configs = {"config.json": hf_config} | ({generation.name: safetensors.read_json(generation)} if generation.exists() else {})
    found = []
    for file, config in configs.items():
        named = config.get("eos_token_id")
        ids = named if isinstance(named, list) else [] if named is None else [named]
        if wrong := [token for token in ids if type(token) is not int]:
            raise UserError(f"{folder / file}: eos_token_id has {wrong[0]!r:.80}; expected a token id, or a list of them")
        found += ids
    return found


def load_params(
    config: ModelConfig, source: TensorSource, dtype: jnp.dtype, mesh: Mesh | None = None, quantize: str = NOT_QUANTIZED
) -> llama.Params:
    """Reads every weight that the model needs, quantises it if that is asked for, and places it.

    Raises:
      UserError: names tensors that are missing, of another shape, or not expected.
    """
    abstract = nn.meta.unbox(sharding.abstract_params(config))
    names = _source_names(abstract)
    _check_tensors(config, abstract, names, source)
    kinds = stored.kinds(abstract, quantize)
    if mesh is None:
        home = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placements = jax.tree.map(lambda kind: home if kind == NOT_QUANTIZED else Quantized(home, home), kinds)
    else:
        placements = sharding.param_shardings(config, mesh, quantize)

    def load(name: str, kind: str, placement: jax.sharding.Sharding | Quantized) -> jax.Array | Quantized:
        tensor, parts = source.read(name), {}
        if kind != NOT_QUANTIZED:
            return quantizing.place(source.shapes[name], tensor.__getitem__, kind, placement)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            if (key := str(index)) not in parts:  # several devices may hold the same
                parts[key] = tensor[index].astype(dtype, copy=False)
            return parts[key]

        # Each process reads only the parts that its own devices hold; waiting keeps one tensor at a time in the host's memory.
        shape = source.shapes[name]
        read_as = _by_rows(placement, shape)
        array = jax.make_array_from_callback(shape, read_as, part)
        return (array if read_as == placement else _move(array, placement)).block_until_ready()

    with _memory_without_gaps():
        return jax.tree.map(load, names, kinds, placements)


@contextlib.contextmanager
def _memory_without_gaps() -> Iterator[None]:
    """What is freed here goes back to the system at once.

    The C library (glibc) would keep the buffers that tensors were read into between the arrays that stay, up to 32 MiB each: it came to a
    tenth of a model.
    """
    trim_threshold, mmap_threshold, mebibyte = -1, -3, 2**20
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is None:
        yield
        return
    set_option(mmap_threshold, mebibyte)
    try:
        yield
    finally:  # where they are by themselves in a program with large arrays; set once, they stay
        set_option(mmap_threshold, 32 * mebibyte)
        set_option(trim_threshold, 64 * mebibyte)


def _by_rows(placement: jax.sharding.Sharding, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """How a tensor is read that is to lie like that: in as many parts, of whole rows.

    Where each of several processes is to have some columns, of every row, it would read nearly every page of the file. Rows follow each
    other there; the devices then send each other what they need.
    """
    if not (isinstance(placement, NamedSharding) and placement.mesh.is_multi_process and any(placement.spec[1:])):
        return placement
    axes = tuple(axis for axis in placement.mesh.axis_names if axis in placement.spec)
    if shape[0] % math.prod(placement.mesh.shape[axis] for axis in axes):
        return placement
    return NamedSharding(placement.mesh, PartitionSpec(axes))


def _move(array: jax.Array, placement: jax.sharding.Sharding) -> jax.Array:
    """The same array, laid out like that over the same devices, also those of other processes."""
    return jax.jit(_as_it_is, out_shardings=placement)(array)


def _as_it_is(array: jax.Array) -> jax.Array:
    return array


def load_codes(config: ModelConfig, source: gguf.GGUFSource) -> dict[str, Any]:
    """Reads the codes of every matrix that the file stores as such, for `llama.with_codes`."""

    def read(names: dict[str, str]) -> dict[str, Codes]:
        found = {ours: source.codes(name) for ours, name in names.items()}
        return {ours: jax.tree.map(jnp.asarray, codes) for ours, codes in found.items() if codes is not None}

    names = _source_names(nn.meta.unbox(sharding.abstract_params(config)))
    return read({"head": names["embed" if config.tie_embeddings else "lm_head"]}) | {"blocks": tuple(map(read, names["blocks"]))}


def quantized_codes(config: ModelConfig, params: llama.Params) -> dict[str, Any]:
    """Makes, of quantised params, what `load_codes` reads."""

    def codes(weights: dict[str, jax.Array | Quantized]) -> dict[str, Codes]:
        found = {name: stored.of_quantized(weight) for name, weight in weights.items() if isinstance(weight, Quantized)}
        return {name: codes for name, codes in found.items() if codes is not None}

    return codes({"head": params["embed" if config.tie_embeddings else "lm_head"]}) | {"blocks": tuple(map(codes, params["blocks"]))}


def _source_names(abstract: llama.Params) -> llama.Params:
    """The name of every weight in its source, in the structure of the params."""
    blocks = tuple({ours: f"model.layers.{layer}.{_BLOCK_NAMES[ours]}" for ours in block} for layer, block in enumerate(abstract["blocks"]))
    return {ours: blocks if ours == "blocks" else _TOP_NAMES[ours] for ours in abstract}


def _check_tensors(config: ModelConfig, abstract: llama.Params, names: llama.Params, source: TensorSource) -> None:
    wanted = {name: leaf.shape for name, leaf in zip(jax.tree.leaves(names), jax.tree.leaves(abstract), strict=True)}
    ignored = {name for name in source.shapes if name.endswith(_IGNORED_SUFFIXES)}
    if config.tie_embeddings:
        ignored.add(_TOP_NAMES["lm_head"])
    missing = sorted(set(wanted) - set(source.shapes))
    unexpected = sorted(set(source.shapes) - set(wanted) - ignored)
    if missing or unexpected:
        problems = [f"{len(found)} {word}: {_some(found)}" for word, found in (("missing", missing), ("not expected", unexpected)) if found]
        raise UserError(
            f"{source.description}: tensors do not fit a {config.architecture} of {config.num_layers} layers; " + "; ".join(problems)
        )
    for name, shape in wanted.items():
        if source.shapes[name] != shape:
            raise UserError(f"{source.description}: tensor {name} has shape {list(source.shapes[name])}; expected {list(shape)}")


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
