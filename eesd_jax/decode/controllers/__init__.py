"""Controllers: how many tokens to draft in a round, learnt from how many were accepted.

`protocol.py` says what a controller is. Every other file of this folder is one of them, or what several share, and is found by lying here:
a new controller is a new file, whose class `register` gives its name.

Controllers may look at drafts that were sampled already, because every sampled draft is verified: none of them can change the output's law.
The paper's prior, its Cali-TS formula and its hyper-parameters are not known to us; the defaults in `config.py` are our own.
"""

import importlib
import pkgutil

from eesd_jax.decode.controllers.beta import Beta, draw_beta
from eesd_jax.decode.controllers.calibrated import Calibrated, Calibration
from eesd_jax.decode.controllers.cost_aware import CostAware, CostPlan, CostState
from eesd_jax.decode.controllers.fixed import Fixed
from eesd_jax.decode.controllers.names import (
    AUTO,
    PLAIN,
    ControllerSpec,
    build_controller,
    known_names,
    needs_costs,
    parse_controller,
    with_sources,
)
from eesd_jax.decode.controllers.protocol import Controller, Offer, Outcome, Posterior, Setup, register
from eesd_jax.decode.controllers.replacements import Replacements
from eesd_jax.decode.controllers.threshold import Threshold

__all__ = [
    "AUTO",
    "PLAIN",
    "Beta",
    "Calibrated",
    "Calibration",
    "Controller",
    "ControllerSpec",
    "CostAware",
    "CostPlan",
    "CostState",
    "Fixed",
    "Offer",
    "Outcome",
    "Posterior",
    "Replacements",
    "Setup",
    "Threshold",
    "build_controller",
    "draw_beta",
    "known_names",
    "needs_costs",
    "parse_controller",
    "register",
    "with_sources",
]

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
