"""Makes an exit branch that was never trained: it takes as long as a trained one, which is all that measuring time needs."""

import numpy as np

from eesd_jax.config import DraftConfig
from eesd_jax.decode.controllers import Calibration
from eesd_jax.engine.drafter import Drafter
from eesd_jax.model.exit_branch import init_exit_branch
from eesd_jax.weights.load import LoadedModel

EXIT_LAYER = 4
DRAFT_VOCAB = 8192


def untrained_drafter(model: LoadedModel, max_draft: int, longest_match: int = 0, exit_layer: int = EXIT_LAYER) -> Drafter:
    """Copies block N + 1 as a branch after block N that can draft 8,192 tokens; adds lookup, if `longest_match` is not 0."""
    ids = np.arange(min(DRAFT_VOCAB, model.config.vocab_size))
    branch = init_exit_branch(model.config, model.params, exit_layer, "next", ids)
    return Drafter(branch, DraftConfig(exit_layer, max_draft, longest_match=longest_match), Calibration(), trained=False)
