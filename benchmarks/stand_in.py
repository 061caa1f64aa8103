"""An exit branch that was never trained: as quick as a trained one, which is all that a measurement of time asks of it."""

import numpy as np

from eesd_jax.config import DraftConfig
from eesd_jax.decode.controllers import Calibration
from eesd_jax.engine.drafter import Drafter
from eesd_jax.model.exit_branch import init_exit_branch
from eesd_jax.weights.load import LoadedModel

EXIT_LAYER = 4
DRAFT_VOCAB = 8192


def untrained_drafter(model: LoadedModel, max_draft: int, longest_match: int = 0, exit_layer: int = EXIT_LAYER) -> Drafter:
    """A copy of block N + 1 behind block N that can draft 8,192 tokens; lookup beside it, if `longest_match` is not 0."""
    ids = np.arange(min(DRAFT_VOCAB, model.config.vocab_size))
    branch = init_exit_branch(model.config, model.params, exit_layer, "next", ids)
    return Drafter(branch, DraftConfig(exit_layer, max_draft, longest_match=longest_match), Calibration(), trained=False)
