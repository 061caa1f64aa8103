"""What is wrong with an experiment, said before anything slow begins; and what makes it the experiment that it is."""

from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from eesd_jax.config import NOT_QUANTIZED, ExperimentConfig
from eesd_jax.distill import experiment
from eesd_jax.errors import UserError
from eesd_jax.model import exit_branch
from eesd_jax.model.config import ModelConfig

# Fields that may differ between the parts of one run: where it runs, what it shows, and what made the data (which has a fingerprint).
_FREE_FIELDS = ("output_dir", "mesh", "checkpoint", "evaluation", "self_generate", "data.path", "cache.path")


def check_config(config: ExperimentConfig) -> None:
    """Raises UserError for what can be known to be wrong without the model."""
    if not config.output_dir:
        raise UserError("output_dir is empty; expected a folder for checkpoints and results")
    for name in ("steps", "batch_size"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}; expected an integer >= 1")
    if config.dtype not in ("", "float32", "bfloat16"):
        raise UserError(f"dtype is {config.dtype!r}; expected float32, bfloat16, or nothing for the device's own")
    if config.batch_size % config.optimizer.accumulate:
        raise UserError(f"batch_size is {config.batch_size}; expected a multiple of optimizer.accumulate, {config.optimizer.accumulate}")
    if config.loss.passes > 1 and not config.branch.deep_input:
        raise UserError(f"loss.passes is {config.loss.passes} without branch.deep_input; expected 1, or branch.deep_input=True")
    if config.cache.enabled and jax.process_count() > 1:
        raise UserError(f"cache.enabled is True with {jax.process_count()} processes; expected one process, or cache.enabled=False")
    if "://" in config.cache.path or (config.cache.enabled and not config.cache.path and "://" in config.output_dir):
        raise UserError(
            f"the cache would be in {config.cache.path or config.output_dir!r}; expected a folder of this machine as cache.path "
            "(it is mapped to memory)"
        )


def find(address: str, what: str) -> epath.Path:
    """The path of an address, local or in a bucket; raises UserError where it cannot be read, or leads through a file."""
    try:
        path = epath.Path(address).expanduser()
        path.exists()
        return path
    except (OSError, ImportError, LookupError) as error:  # the last two: what etils would read that address with is not there
        raise UserError(f"{what} is {address!r}, which cannot be read ({type(error).__name__}: {error}); expected a folder") from None


def check_against_model(config: ExperimentConfig, model_config: ModelConfig) -> None:
    """Raises UserError for what that model cannot do."""
    exit_branch.check_exit_layer(model_config, config.branch.exit_layer, deep_input=config.branch.deep_input)
    vocab_size, context = model_config.vocab_size, model_config.context_length
    if not 0 <= config.branch.draft_vocab <= vocab_size:
        raise UserError(f"branch.draft_vocab is {config.branch.draft_vocab}; expected 0 (all) to {vocab_size}, the model's vocabulary")
    if config.data.sequence_length > context:
        raise UserError(f"data.sequence_length is {config.data.sequence_length}; expected at most {context}, the model's context")
    if config.cache.enabled:
        check_cache(config, vocab_size)


def check_given_branch(config: ExperimentConfig, branch: exit_branch.ExitBranch) -> None:
    """Raises UserError where training cannot go on from that branch with these settings."""
    ours, deep, size = config.branch, branch.fusion is not None, branch.draft_ids.size
    if ours.deep_input != deep or ours.draft_vocab not in (0, size):
        raise UserError(
            f"branch.init_from is {ours.init_from!r}, which has deep_input {deep} and a draft_vocab of {size}, and branch.deep_input is "
            f"{ours.deep_input}, branch.draft_vocab {ours.draft_vocab}; expected the same (for draft_vocab 0 will do)"
        )


def check_cache(config: ExperimentConfig, vocab_size: int) -> None:
    """Raises UserError for a loss that needs more of the target's distribution than the cache keeps."""
    kept = config.cache.top_tokens
    if not 1 <= kept <= vocab_size:
        raise UserError(f"cache.top_tokens is {kept}; expected 1 to {vocab_size}, the size of the vocabulary")
    needy = [name for name in ("reverse_kl", "total_variation") if getattr(config.loss, name)]
    if needy and kept < vocab_size:
        raise UserError(
            f"loss.{needy[0]} needs the whole distribution of the target, and the cache keeps {kept} tokens of {vocab_size}; "
            f"expected cache.enabled=False, cache.top_tokens={vocab_size}, or another loss"
        )


def comparable(config: ExperimentConfig) -> dict[str, Any]:
    """The fields that make an experiment what it is, by their dotted names."""

    def flatten(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            path = prefix + name
            if path in _FREE_FIELDS:
                continue
            if isinstance(value, dict):
                yield from flatten(value, f"{path}.")
            else:
                yield path, value

    fields = dict(flatten(experiment.to_dict(config), ""))
    for name, without in (("quantize", NOT_QUANTIZED), ("branch.init_from", "")):
        if fields[name] == without:
            del fields[name]  # so that runs that were begun before there was this field go on
    return fields
