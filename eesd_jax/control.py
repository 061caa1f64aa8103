"""From a controller's name, as users write it, to the controller; and the measured cost of a round that `cost_aware` needs."""

import dataclasses
import re
from typing import TYPE_CHECKING

from eesd_jax.config import ControllerConfig
from eesd_jax.errors import UserError

if TYPE_CHECKING:
    from eesd_jax.decode.controllers import Calibration, Controller

PLAIN = "plain"  # no speculation
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


def build_controller(
    spec: ControllerSpec, settings: ControllerConfig, calibration: "Calibration", cost: tuple[float, ...] | None
) -> "Controller | None":
    """The controller of a spec; None for plain decoding.

    Args:
      calibration: of the branch's confidence.
      cost: seconds of a round with 0, 1, ... max_draft drafts; only `cost_aware` needs it.
    """
    from eesd_jax.decode.controllers import Beta, Calibrated, CostAware, Fixed, Threshold  # JAX, which who only parses names does without

    prior = {name: getattr(settings, name) for name in ("prior_alpha", "prior_beta", "discount", "idle_discount")}
    match spec.kind:
        case "plain":
            return None
        case "fixed":
            return Fixed(spec.value)
        case "threshold":
            return Threshold(spec.value)
        case "beta":
            return Beta(**prior, censored=spec.value != "plain")
        case "calibrated":
            return Calibrated(**prior, calibration=calibration, kappa=settings.kappa, capacity=settings.capacity)
        case _:
            return CostAware(**prior, calibration=calibration, cost=cost)
