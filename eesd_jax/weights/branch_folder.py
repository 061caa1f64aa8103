"""Exit branches on disk: a folder of `exit_branch.safetensors` and `config.json`, on this machine, on a hub, or shipped with this package.

The same branch always gives the same bytes (nothing in a folder says when or where it was made). Tensors are named as in `ExitBranch`:
`block.wq`, ..., `norm`, `head`, `draft_ids`, and `fusion.norm` and `fusion.weight` where there is a second input. A matrix may be stored in
8 bits: int8 codes, and beside them as `head.scale` the float16 by which those of each group of 32 are multiplied. `config.json` also says
which target the branch was made for: a target of another shape is refused; one with other weights (a base model in place of its chat
model) is warned of, since the output stays right and only acceptance suffers.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from eesd_jax.errors import UserError
from eesd_jax.model import exit_branch, llama, stored
from eesd_jax.model.config import ModelConfig
from eesd_jax.model.exit_branch import ExitBranch, Fusion
from eesd_jax.model.stored import Codes
from eesd_jax.weights import hub, safetensors

TENSORS_NAME = "exit_branch.safetensors"
INFO_NAME = "config.json"
FORMAT_VERSION = 1
SHIPPED = pathlib.Path(__file__).parent.parent / "branches"

_FUSION, _SCALE = "fusion.", ".scale"
_FINGERPRINTED = 64  # values of each weight
_NOT_SHAPE_OR_MEANING = ("architecture", "context_length")


@dataclasses.dataclass(frozen=True)
class BranchInfo:
    """What `config.json` says, beside the version of the format.

    Attributes:
      exit_layer: N, how many of the target's blocks stand before the branch.
      hidden_size, vocab_size: of the target.
      draft_vocab_size: tokens that the branch can draft.
      start: how the branch was initialised (see `init_exit_branch`; free form).
      calibration_slope, calibration_intercept: of the branch's confidence (see `Calibration`).
      target_config_hash, target_fingerprint: of the target that the branch was made for (`config_hash`, `fingerprint`).
      training: where its weights come from, free form; empty where it was never trained.
    """

    exit_layer: int
    hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    start: str
    calibration_slope: float
    calibration_intercept: float
    target_config_hash: str
    target_fingerprint: str
    training: dict[str, Any]


class LoadedBranch(NamedTuple):
    """branch: its weights, in the target's dtype and on its devices. info: what its folder says of it."""

    branch: ExitBranch
    info: BranchInfo


def describe(
    config: ModelConfig,
    params: llama.Params,
    branch: ExitBranch,
    *,
    exit_layer: int,
    start: str,
    calibration: tuple[float, float],
    training: dict[str, Any],
) -> BranchInfo:
    """What there is to say of a branch of this target.

    Args:
      config, params: of the target.
      calibration: slope and intercept.
      training, start, exit_layer: see `BranchInfo`.
    """
    return BranchInfo(
        exit_layer=exit_layer,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        draft_vocab_size=branch.draft_ids.size,
        start=start,
        calibration_slope=float(calibration[0]),
        calibration_intercept=float(calibration[1]),
        target_config_hash=config_hash(config),
        target_fingerprint=fingerprint(params),
        training=training,
    )


def config_hash(config: ModelConfig) -> str:
    """SHA-256 of the fields that say what the target computes; floats as float32, because GGUF files hold no more of them."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return float(np.float32(value)) if isinstance(value, float) else value

    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_SHAPE_OR_MEANING}
    return hashlib.sha256(json.dumps(plain(fields), sort_keys=True).encode()).hexdigest()


def fingerprint(params: llama.Params) -> str:
    """SHA-256 over every weight's name, shape and first 64 values as bfloat16: the same for a float32 and a bfloat16 load.

    Of each weight a name such as `blocks/3/wq`, a shape such as `(576, 576)` and the values, in the order of those names' paths.
    """
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(stored.dense(params)), strict=True)
    home = leaves[0].sharding
    # On a mesh the values are wanted on every host.
    placement = NamedSharding(home.mesh, PartitionSpec()) if isinstance(home, NamedSharding) else None
    starts = jax.device_get(jax.jit(_first_values, out_shardings=placement)(leaves))
    digest = hashlib.sha256()
    for path, leaf, values in zip(paths, leaves, starts, strict=True):
        digest.update(f"{jax.tree_util.keystr(path, simple=True, separator='/')} {tuple(leaf.shape)}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def _first_values(leaves: tuple[jax.Array, ...]) -> list[jax.Array]:
    def first(leaf: jax.Array) -> jax.Array:
        # Rows first: to flatten a weight that is spread over devices would move all of it.
        rows = leaf[: math.ceil(_FINGERPRINTED / math.prod(leaf.shape[1:]))]
        return rows.ravel()[:_FINGERPRINTED].astype(jnp.bfloat16)

    return [first(leaf) for leaf in leaves]


def find_branch(name: str) -> pathlib.Path:
    """The folder of an exit branch: a folder on this machine, a model's name (that of `shipped_branch`), or a hub id, fetched if need be.

    Raises:
      UserError: nothing by that name, or it cannot be fetched.
    """
    path = pathlib.Path(name).expanduser()
    if name and path.is_dir():
        return path
    if name and not hub.looks_local(name) and (shipped := shipped_branch(name)):
        return shipped
    expected = f"expected auto, none, a folder of {TENSORS_NAME} and {INFO_NAME}, or a hub id"
    if path.is_file():
        raise UserError(f"exit branch {name!r} is a file; {expected}")
    if not name or hub.looks_local(name):
        raise UserError(f"exit branch {name!r}: no such folder; {expected}")
    return hub.fetch_repository(name, "exit branch", expected, [TENSORS_NAME, INFO_NAME])


def shipped_branch(model: str) -> pathlib.Path | None:
    """The folder of the branch that this package carries for a model of that name (`/` becomes `--`), or None."""
    folder = SHIPPED / model.replace("/", "--")
    return folder if (folder / INFO_NAME).exists() else None


class BranchFolder:
    """An exit branch's folder, opened: all that can be known without the target is checked here, before a large target is read.

    Attributes:
      path: the folder.
      info: what its `config.json` says.

    Raises:
      UserError: a file is missing, truncated or of another format.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        for name in (TENSORS_NAME, INFO_NAME):
            if not (path / name).is_file():
                raise UserError(f"{path}: no {name} in this folder; expected an exit branch: {TENSORS_NAME} and {INFO_NAME}")
        self.info = _read_info(path / INFO_NAME)
        try:
            # The header is checked against the file's size here.
            self._tensors = safe_open(path / TENSORS_NAME, framework="numpy")
            self._names = set(self._tensors.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path / TENSORS_NAME}: truncated or not a safetensors file ({error})") from None

    def load(self, config: ModelConfig, params: llama.Params, mesh: Mesh | None = None) -> LoadedBranch:
        """Reads the branch for a target, and warns (`UserWarning`) where it was made for another one of the same shape.

        Args:
          config, params: of the target. The branch gets its dtype.
          mesh: where the target is, see `load_model`.

        Raises:
          UserError: the branch does not fit the target, or a tensor is missing, unexpected or unusable.
        """
        info = self.info
        for name in ("hidden_size", "vocab_size"):
            if getattr(info, name) != getattr(config, name):
                raise UserError(f"{self.path}: exit branch has {name} {getattr(info, name)}; the model's is {getattr(config, name)}")
        deep_input = any(name.startswith(_FUSION) for name in self._names)
        try:
            exit_branch.check_exit_layer(config, info.exit_layer, deep_input=deep_input)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        abstract = exit_branch.abstract_exit_branch(config, info.draft_vocab_size, deep_input=deep_input)
        names = _tensor_names(abstract)
        self._check_tensors(names, abstract)
        draft_ids = self._read(names.draft_ids)
        try:
            exit_branch.check_draft_ids(config, draft_ids)
        except UserError as error:
            raise UserError(f"{self.path / TENSORS_NAME}: {error}") from None
        if mesh is None:
            placements = jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), abstract)
        else:
            placements = exit_branch.exit_branch_shardings(config, info.draft_vocab_size, mesh, deep_input=deep_input)

        def place(name: str, placement: jax.sharding.Sharding) -> jax.Array:
            data = draft_ids if name == names.draft_ids else self._read(name).astype(params["final_norm"].dtype, copy=False)
            return jax.make_array_from_callback(data.shape, placement, data.__getitem__)

        branch = jax.tree.map(place, names, placements)
        self._warn_of_another_target(config, params)
        return LoadedBranch(branch, info)

    def _check_tensors(self, names: ExitBranch, abstract: ExitBranch) -> None:
        where = self.path / TENSORS_NAME
        wanted = dict(zip(jax.tree.leaves(names), jax.tree.leaves(abstract), strict=True))
        found = {name for name in self._names if not name.endswith(_SCALE)}
        missing, unexpected = sorted(wanted.keys() - found), sorted(found - wanted.keys())
        if missing or unexpected:
            problems = [f"{word}: {', '.join(some)}" for word, some in (("missing", missing), ("not expected", unexpected)) if some]
            raise UserError(f"{where}: tensors do not fit the model's blocks; {'; '.join(problems)}")
        for name, leaf in wanted.items():
            tensor = self._tensors.get_slice(name)
            if tuple(tensor.get_shape()) != leaf.shape:
                raise UserError(f"{where}: tensor {name} has shape {tensor.get_shape()}; expected {list(leaf.shape)} for this model")
            kinds = ("I32",) if leaf.dtype == jnp.int32 else ("F32", "F16", "BF16", *(["I8"] if len(leaf.shape) == 2 else []))
            if tensor.get_dtype() not in kinds:
                raise UserError(f"{where}: tensor {name} is stored as {tensor.get_dtype()}; expected {' or '.join(kinds)}")
            if tensor.get_dtype() == "I8":
                self._check_scale(name, leaf.shape)

    def _check_scale(self, name: str, shape: tuple[int, ...]) -> None:
        where, wanted = self.path / TENSORS_NAME, [shape[0], shape[1] // stored.GROUP]
        if name + _SCALE not in self._names:
            raise UserError(f"{where}: tensor {name} is stored as I8, and there is no {name}{_SCALE}; expected it beside")
        scale = self._tensors.get_slice(name + _SCALE)
        if scale.get_shape() != wanted or scale.get_dtype() != "F16" or shape[1] % stored.GROUP:
            raise UserError(f"{where}: tensor {name}{_SCALE} is {scale.get_dtype()} {scale.get_shape()}; expected F16 {wanted}")

    def _read(self, name: str) -> np.ndarray:
        try:
            tensor = self._tensors.get_tensor(name)
            if tensor.dtype == np.int8:
                scale = self._tensors.get_tensor(name + _SCALE).astype(np.float32)
                tensor = np.asarray(stored.numbers(Codes(tensor, scale, None)))
            return tensor
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path / TENSORS_NAME}: cannot read tensor {name} ({error})") from None

    def _warn_of_another_target(self, config: ModelConfig, params: llama.Params) -> None:
        ours = {"config hash": config_hash(config), "weight fingerprint": fingerprint(params)}
        theirs = {"config hash": self.info.target_config_hash, "weight fingerprint": self.info.target_fingerprint}
        differences = [
            f"its target's {what} is {theirs[what][:12]}, this model's {ours[what][:12]}" for what in ours if ours[what] != theirs[what]
        ]
        if differences:
            warnings.warn(
                f"exit branch {str(self.path)!r} was made for another model ({'; '.join(differences)}): "
                "the output stays right, but fewer drafts may be accepted",
                stacklevel=3,
            )


def load_branch(name: str, config: ModelConfig, params: llama.Params, mesh: Mesh | None = None) -> LoadedBranch:
    """Finds and reads an exit branch; see `find_branch` and `BranchFolder.load`."""
    return BranchFolder(find_branch(name)).load(config, params, mesh)


def save_branch(folder: str | pathlib.Path, branch: ExitBranch, info: BranchInfo, *, in_bytes: bool = False) -> None:
    """Writes an exit branch's folder, in the dtype of its arrays (which this process must be able to read); older files are replaced.

    Args:
      in_bytes: whether matrices are stored in 8 bits, where their inputs can be grouped.

    Raises:
      UserError: the folder cannot be written.
    """
    names = jax.tree.leaves(_tensor_names(branch))
    tensors = {name: np.asarray(leaf) for name, leaf in zip(names, jax.device_get(jax.tree.leaves(branch)), strict=True)}
    if in_bytes:
        for name in [name for name, tensor in tensors.items() if tensor.ndim == 2]:
            if (codes := stored.rounded(jnp.asarray(tensors[name]))) is not None:
                tensors |= {name: np.asarray(codes.codes), name + _SCALE: np.asarray(codes.scale, np.float16)}
    text = json.dumps({"format_version": FORMAT_VERSION} | dataclasses.asdict(info), indent=2, allow_nan=False) + "\n"
    replace_files(
        folder,
        {TENSORS_NAME: lambda path: save_file(tensors, path), INFO_NAME: lambda path: path.write_text(text, encoding="utf-8")},
    )


def replace_files(folder: str | pathlib.Path, writers: dict[str, Callable[[pathlib.Path], Any]]) -> None:
    """Writes files of a folder under temporary names, and renames them when all are complete; `INFO_NAME` vouches for the others.

    Raises:
      UserError: the folder cannot be written.
    """
    folder = pathlib.Path(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as name:
            partial = pathlib.Path(name)
            for file, write in writers.items():
                write(partial / file)
            readable = (partial / INFO_NAME).stat().st_mode  # safetensors makes files that only their owner can read
            for file in writers:
                (partial / file).chmod(readable)
            # A folder without it is refused, so whoever reads, or starts again after a crash, never sees new tensors with old words.
            (folder / INFO_NAME).unlink(missing_ok=True)
            for file in sorted(writers, key=lambda file: file == INFO_NAME):
                (partial / file).replace(folder / file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"exit branch folder {str(folder)!r} cannot be written ({error})") from None


def _tensor_names(branch: ExitBranch) -> ExitBranch:
    """The name of every tensor in the file, in the structure of the branch."""
    fusion = branch.fusion and Fusion(*(f"{_FUSION}{name}" for name in ("norm", "weight")))
    return ExitBranch({name: f"block.{name}" for name in branch.block}, "norm", "head", "draft_ids", fusion)


def _read_info(path: pathlib.Path) -> BranchInfo:
    fields = safetensors.read_json(path)
    version = fields.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format_version is {version!r}; expected {FORMAT_VERSION}, that of an exit branch")

    def read(name: str, kind: type) -> Any:
        value = fields.get(name)
        value = float(value) if kind is float and type(value) is int else value
        least = 0 if name == "exit_layer" else 1
        if type(value) is not kind or (kind is int and value < least) or (kind is float and not math.isfinite(value)):
            expected = {int: f"an integer >= {least}", float: "a finite number", str: "a text", dict: "an object"}[kind]
            raise UserError(f"{path}: {name} is {value!r}; expected {expected}")
        return value

    kinds = {field.name: dict if field.name == "training" else field.type for field in dataclasses.fields(BranchInfo)}
    return BranchInfo(**{name: read(name, kind) for name, kind in kinds.items()})
