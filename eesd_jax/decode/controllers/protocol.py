"""What a controller is: the questions that a round asks it, what it is told, and how it comes to have a name.

A controller of one's own derives from `Controller`; docs/controllers.md has one. Loading it by name is left to `names.py`.

Axes: B rows, K drafts at most.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from eesd_jax.config import ControllerConfig
from eesd_jax.decode.controllers.lazy import jax, jnp
from eesd_jax.errors import UserError

if TYPE_CHECKING:
    from eesd_jax.decode.controllers.calibrated import Calibration
    from eesd_jax.decode.costs import RoundCosts
    from eesd_jax.decode.sources.lookup import Lookup


class Offer(NamedTuple):
    """What a round begins with.

    running: bool [B], rows that are not finished. found: what lookup found in the text; None where it was not asked.
    """

    running: jax.Array
    found: Lookup | None = None


class Outcome(NamedTuple):
    """What became of a round's drafts, of which those after the end of the text count neither way.

    drafted, accepted: int32 [B], tokens drafted, and accepted of those. replaced: bool [B], rows in which another candidate stood in for
    the rejected draft (`DraftConfig.candidates`).
    """

    drafted: jax.Array
    accepted: jax.Array
    replaced: jax.Array


class Posterior(NamedTuple):
    """A belief about the acceptance of a draft: Beta(alpha, beta), pseudo-counts of accepted and of rejected drafts, float32 [B] each."""

    alpha: jax.Array
    beta: jax.Array

    @property
    def mean(self) -> jax.Array:
        """The expected acceptance, float32 [B]."""
        return self.alpha / (self.alpha + self.beta)


class Argument:
    """Something that compiled programs take as an argument, so that other numbers in it compile nothing again.

    The fields of a dataclass are arguments, but for those that are a bool or a str, or marked `metadata={"static": True}`: these are
    compiled in. What is no dataclass is compiled in as a whole, once for all instances with equal attributes.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Argument:
        """Makes the class known to JAX with its first instance."""
        _register_pytree(cls)
        return super().__new__(cls)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), *sorted(vars(self).items())))


@functools.cache
def _register_pytree(cls: type) -> None:
    with contextlib.suppress(ValueError):  # its author has done so
        if not dataclasses.is_dataclass(cls):
            jax.tree_util.register_static(cls)
            return
        fields = [field for field in dataclasses.fields(cls) if field.init]
        static = [field.name for field in fields if field.metadata.get("static") or field.type in (bool, str, "bool", "str")]
        jax.tree_util.register_dataclass(cls, [field.name for field in fields if field.name not in static], static)


class Setup(NamedTuple):
    """What controllers are built from.

    calibration: of the branch's confidence. costs: of rounds, where `needs_costs` asks for them. settings: numbers of the learning
    controllers. has_branch, has_lookup: what drafts. candidates: see `DraftConfig`.
    """

    calibration: Calibration
    costs: RoundCosts | None = None
    settings: ControllerConfig = ControllerConfig()
    has_branch: bool = True
    has_lookup: bool = False
    candidates: int = 1

    @property
    def prior(self) -> dict[str, float]:
        """The settings that all posteriors share."""
        return {name: getattr(self.settings, name) for name in ("prior_alpha", "prior_beta", "discount", "idle_discount")}


class Controller(Argument):
    """Decides how many tokens to draft: settings with pure functions. What it learns is in a state, which the decoding loop carries.

        state = controller.init(batch)
        plan = controller.propose(keys_B, state, offer)                          # once a round
        keep_B, plan = controller.keep_drafting(keys_B, plan, k, confidence_B)   # before draft k, k = 0, 1, ...
        state = controller.update(state, plan, outcome)                          # once a round

    State and plan are pytrees of arrays with leading axis B. As they stand here, the functions learn nothing and believe nothing; only
    `keep_drafting` must be written. Keys are one a row, and new with every call.

    Attributes:
      needs_costs: whether `build` must be given what rounds cost.
      needs_branch: whether it means nothing where only lookup drafts.
      chooses_source: whether it decides itself, in `look_up`, in which rows looked-up drafts are taken. Otherwise a bandit does
        (`sources/bandit.py`), and asks the controller where the exit branch is to draft.
    """

    needs_costs: ClassVar[bool] = False
    needs_branch: ClassVar[bool] = True
    chooses_source: ClassVar[bool] = False

    @classmethod
    def parse(cls, value: str | None, max_draft: int) -> Any:
        """Reads what stands after the colon of the name: what `build` takes. value: None where there is no colon.

        Raises:
          ValueError: with the reason, where the value cannot be; without one, where there is no such name.
        """
        if value is not None:
            raise ValueError
        return None

    @classmethod
    def build(cls, value: Any, setup: Setup) -> Controller:
        """Makes the controller that a name asks for; `value` is of `parse`."""
        try:
            return cls()
        except TypeError as error:
            raise UserError(f"{cls.__name__} cannot be made from its name ({error}); expected defaults for all settings") from None

    def init(self, batch: int) -> Any:
        """Returns the state before the first round."""
        return None

    def propose(self, keys_B: jax.Array, state: Any, offer: Offer) -> Any:
        """Draws what the round's decisions follow."""
        return state

    def look_up(self, plan: Any, offer: Offer) -> jax.Array:
        """Returns how many looked-up drafts each row takes, int32 [B], 0 for none: see `chooses_source`."""
        return jnp.zeros(offer.running.shape, jnp.int32)

    def keep_drafting(self, keys_B: jax.Array, plan: Any, k: jax.Array, confidence_B: jax.Array) -> tuple[jax.Array, Any]:
        """Says whether the branch drafts one more after k drafts: bool [B], or one for all rows; and the plan for the next question.

        It is asked after every draft, the last one included. confidence_B: float32 [B], the branch's probability of the draft sampled last;
        1 at k = 0.
        """
        raise NotImplementedError(f"{type(self).__name__}.keep_drafting")

    def update(self, state: Any, plan: Any, outcome: Outcome) -> Any:
        """Learns from a round; the plan is as it was in the end."""
        return state

    def posterior(self, state: Any) -> Posterior | None:
        """Returns what is believed of the next draft, for the log; None where the controller has no such belief."""
        return None


REGISTRY: dict[str, type[Controller]] = {}
USAGES: list[str] = []


def register(*usages: str) -> Callable[[type], type]:
    """Gives a class its name, as users write it: `fixed:K`, or several, as in `beta` and `beta:plain`."""

    def add(cls: type) -> type:
        REGISTRY[usages[0].partition(":")[0]] = cls
        USAGES.extend(usages)
        return cls

    return add
