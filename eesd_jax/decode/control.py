"""From a controller's name, as users write it, to the controller; and the measured cost of a round that `cost_aware` needs."""

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from eesd_jax.config import ARMS, ControllerConfig
from eesd_jax.errors import UserError

if TYPE_CHECKING:
    from eesd_jax.decode.controllers import Calibration, Controller
    from eesd_jax.decode.costs import RoundCosts

PLAIN = "plain"  # no speculation
AUTO = "auto"  # the default controller where something drafts, else plain
WITHOUT_BRANCH = ("plain", "fixed", "cost_aware")  # kinds that can go by lookup alone
CONTROLLERS = "plain, fixed:K, threshold:t, beta, beta:plain, calibrated, cost_aware"


@dataclasses.dataclass(frozen=True)
class ControllerSpec:
    """A controller's name taken apart: `fixed:3` is kind "fixed" and value 3; value is None where nothing stands behind the kind."""

    kind: str
    value: float | str | None = None


def parse_controller(name: str, max_draft: int) -> ControllerSpec:
    """Takes a controller's name apart.

    Raises:
      UserError: an unknown name, a K that is not in 0..max_draft, a t that is not in [0, 1].
    """
    kind, colon, value = name.partition(":")
    unknown = UserError(f"controller {name!r} is unknown; expected one of {CONTROLLERS}")
    if kind == "fixed" and re.fullmatch(r"\d+", value):
        if int(value) > max_draft:
            raise UserError(f"controller {name!r} drafts more than max_draft, which is {max_draft}")
        return ControllerSpec(kind, int(value))
    if kind == "threshold" and re.fullmatch(r"\d*\.?\d+", value):
        if float(value) > 1:
            raise UserError(f"controller {name!r}: expected a threshold from 0 to 1")
        return ControllerSpec(kind, float(value))
    if name == "beta:plain":
        return ControllerSpec(kind, "plain")
    if name in ("plain", "beta", "calibrated", "cost_aware") and not colon:
        return ControllerSpec(kind)
    raise unknown


def parse_arms(names: str | Sequence[str]) -> tuple[str, ...]:
    """Checks the sources of drafts; a text names one, or several with commas between them.

    Raises:
      UserError: none, or one that there is not.
    """
    if isinstance(names, str):
        names = [name.strip() for name in names.split(",")]
    if not isinstance(names, list | tuple | set) or not names or any(name not in ARMS for name in names):
        given = ",".join(map(str, names)) if isinstance(names, list | tuple | set) else names
        raise UserError(f"arms are {given!r}; expected one or more of {', '.join(ARMS)}")
    return tuple(arm for arm in ARMS if arm in names)


def build_controller(
    spec: ControllerSpec,
    settings: ControllerConfig,
    calibration: "Calibration",
    costs: "RoundCosts | None",
    *,
    has_branch: bool = True,
    has_lookup: bool = False,
    candidates: int = 1,
) -> "Controller | None":
    """The controller of a spec; None for plain decoding.

    Args:
      calibration: of the branch's confidence.
      costs: of rounds; only `cost_aware`, and the choice between sources, need them.
      has_branch: whether there is an exit branch.
      has_lookup: whether lookup drafts, too.
      candidates: see `DraftConfig`.
    """
    if spec.kind == PLAIN:
        return None
    inner = _branch_controller(spec, settings, calibration, costs, candidates) if has_branch else None
    if not has_lookup:
        return inner
    from eesd_jax.decode.sources.bandit import Arms

    fixed = spec.value if spec.kind == "fixed" and not has_branch else None
    exit_cost, look_cost = (costs.exit, costs.look_up) if costs else ((), ())
    return Arms(inner, exit_cost, look_cost, **_prior(settings), fixed=fixed, candidates=candidates)


def needs_costs(spec: ControllerSpec, *, has_branch: bool, has_lookup: bool) -> bool:
    """Whether a controller of that spec is built from measured costs."""
    return spec.kind == "cost_aware" or (spec.kind != PLAIN and has_branch and has_lookup)


def _prior(settings: ControllerConfig) -> dict[str, float]:
    return {name: getattr(settings, name) for name in ("prior_alpha", "prior_beta", "discount", "idle_discount")}


def _branch_controller(
    spec: ControllerSpec, settings: ControllerConfig, calibration: "Calibration", costs: "RoundCosts | None", candidates: int
) -> "Controller":
    from eesd_jax.decode.controllers import Beta, Calibrated, CostAware, Fixed, Threshold  # JAX, which who only parses names does without

    match spec.kind:
        case "fixed":
            return Fixed(spec.value)
        case "threshold":
            return Threshold(spec.value)
        case "beta":
            return Beta(**_prior(settings), censored=spec.value != "plain")
        case "calibrated":
            return Calibrated(**_prior(settings), calibration=calibration, kappa=settings.kappa, capacity=settings.capacity)
        case _:
            return CostAware(**_prior(settings), calibration=calibration, cost=costs.exit, candidates=candidates)
