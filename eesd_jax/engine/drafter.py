"""What drafts the tokens that the target checks: an exit branch, lookup, or both."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from eesd_jax.config import DraftConfig
from eesd_jax.decode.controllers import Calibration, Controller, ControllerSpec, Setup, build_controller, needs_costs, with_sources
from eesd_jax.decode.costs import RoundCosts
from eesd_jax.errors import UserError
from eesd_jax.model.exit_branch import ExitBranch
from eesd_jax.weights.branch_folder import BranchFolder
from eesd_jax.weights.load import LoadedModel


class Drafter(NamedTuple):
    """What drafts, and how.

    branch: the weights of the exit branch, None where only lookup drafts. draft: where the branch stands, and how much may be drafted.
    calibration: of the branch's confidence. trained: whether it ever was. ngrams: the n-gram table that lookup goes on with, uint32 [E],
    or None; see `decode/sources/ngrams.py`.
    """

    branch: ExitBranch | None
    draft: DraftConfig
    calibration: Calibration
    trained: bool
    ngrams: np.ndarray | None = None

    @property
    def has_lookup(self) -> bool:
        return self.draft.longest_match > 0

    def needs_costs(self, controller: Controller | type[Controller]) -> bool:
        """Whether such a controller is built from measured costs."""
        return needs_costs(controller, has_branch=self.branch is not None, has_lookup=self.has_lookup)

    def controller(self, made: ControllerSpec | Controller, costs: RoundCosts | None) -> Controller | None:
        """Makes the controller of that spec, or takes the one that is given, for these sources; None for plain decoding."""
        setup = Setup(
            calibration=self.calibration,
            costs=costs,
            has_branch=self.branch is not None,
            has_lookup=self.has_lookup,
            candidates=self.draft.candidates,
        )
        return build_controller(made, setup) if isinstance(made, ControllerSpec) else with_sources(made, setup)


def read_drafter(folder: BranchFolder, target: LoadedModel, mesh: Mesh | None, draft: DraftConfig) -> Drafter:
    """The branch of a folder, loaded for that target, with `draft` for all but its place.

    Raises:
      UserError: the folder is damaged, the branch is of another model, or it can draft fewer tokens than there are to be candidates.
    """
    branch, info = folder.load(target.config, target.params, mesh)
    if draft.candidates > branch.draft_ids.size:
        raise UserError(f"candidates is {draft.candidates}; expected at most the {branch.draft_ids.size} tokens of the draft vocabulary")
    calibration = Calibration(info.calibration_slope, info.calibration_intercept)
    return Drafter(branch, dataclasses.replace(draft, exit_layer=info.exit_layer), calibration, trained=bool(info.training))
