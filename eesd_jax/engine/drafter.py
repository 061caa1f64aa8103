"""What drafts the tokens that the target checks: an exit branch, lookup, or both."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from eesd_jax.config import ControllerConfig, DraftConfig
from eesd_jax.decode import control
from eesd_jax.decode.controllers import Calibration, Controller
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

    @property
    def _sources(self) -> dict[str, bool]:
        return {"has_branch": self.branch is not None, "has_lookup": self.has_lookup}

    def needs_costs(self, spec: control.ControllerSpec) -> bool:
        """Whether the controller of that spec is built from measured costs."""
        return control.needs_costs(spec, **self._sources)

    def controller(self, spec: control.ControllerSpec, costs: RoundCosts | None) -> Controller | None:
        """The controller of that spec for these sources; None for plain decoding."""
        candidates = self.draft.candidates
        return control.build_controller(spec, ControllerConfig(), self.calibration, costs, **self._sources, candidates=candidates)


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
