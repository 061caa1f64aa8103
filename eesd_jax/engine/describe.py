"""What an engine answers with, in a few words that change when its weights do: the settings of whatever keeps answers."""

import hashlib
from typing import TYPE_CHECKING, Any

from eesd_jax.weights.branch_folder import fingerprint

if TYPE_CHECKING:
    from eesd_jax.engine.engine import Engine


def describe_drafter(engine: "Engine") -> dict[str, Any]:
    """Which weights answer and which draft."""
    drafter = engine.drafter
    arms = {"exit": drafter and drafter.branch, "lookup": drafter and drafter.draft.longest_match}
    return {
        "arms": "+".join(name for name, used in arms.items() if used),
        "weights": fingerprint(engine.model.params)[:16],
        "exit_branch": fingerprint(drafter.branch)[:16] if drafter and drafter.branch else None,
        "exit_layer": drafter.draft.exit_layer if drafter else None,
        "longest_match": drafter.draft.longest_match if drafter else None,
        "ngrams": hashlib.sha256(drafter.ngrams.tobytes()).hexdigest()[:16] if drafter and drafter.ngrams is not None else None,
        "max_draft": drafter.draft.max_draft if drafter else None,
        "candidates": drafter.draft.candidates if drafter else None,
    }
