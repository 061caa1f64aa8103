"""Controllers by name, and the settings that they are built with."""

import pytest

from eesd_jax import UserError
from eesd_jax.config import ControllerConfig
from eesd_jax.decode.controllers import (
    Beta,
    Calibrated,
    Calibration,
    ControllerSpec,
    CostAware,
    Fixed,
    Setup,
    Threshold,
    build_controller,
    known_names,
    parse_controller,
)
from eesd_jax.decode.costs import RoundCosts
from eesd_jax.decode.sources.bandit import Arms


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [
        ("plain", "plain", None),
        ("fixed:0", "fixed", 0),
        ("fixed:8", "fixed", 8),
        ("threshold:0", "threshold", 0.0),
        ("threshold:0.35", "threshold", 0.35),
        ("threshold:.5", "threshold", 0.5),
        ("threshold:1", "threshold", 1.0),
        ("beta", "beta", None),
        ("beta:plain", "beta", "plain"),
        ("calibrated", "calibrated", None),
        ("cost_aware", "cost_aware", None),
    ],
)
def test_names(name: str, kind: str, value: object):
    assert parse_controller(name, max_draft=8) == ControllerSpec(kind, value)


@pytest.mark.parametrize(
    "name",
    [
        *("", "Beta", "beta ", "beta:", "beta:censored", "plain:", "plain:1", "calibrated:2", "cost_aware:cpu", "cost-aware", "thompson"),
        *("fixed", "fixed:", "fixed:-1", "fixed:2.5", "fixed:two", "fixed:3:4", "fixed: 3"),
        *("threshold", "threshold:", "threshold:-0.1", "threshold:nan", "threshold:inf", "threshold:1e-1", "threshold:half"),
    ],
)
def test_an_unknown_name_is_refused_with_all_known_ones(name: str):
    with pytest.raises(UserError) as error:
        parse_controller(name, max_draft=8)
    assert repr(name) in str(error.value)
    assert known_names() in str(error.value)


def test_values_out_of_range_are_refused_with_the_range():
    with pytest.raises(UserError, match=r"'fixed:9'.*max_draft, which is 8"):
        parse_controller("fixed:9", max_draft=8)
    with pytest.raises(UserError, match=r"'threshold:1.5'.*from 0 to 1"):
        parse_controller("threshold:1.5", max_draft=8)


def test_controllers_are_built_with_their_settings():
    settings = ControllerConfig(prior_alpha=3.0, prior_beta=2.0, discount=0.8, idle_discount=0.7, kappa=5.0, capacity=11.0)
    calibration, costs = Calibration(1.5, -0.5), RoundCosts((1.0, 1.2, 1.5), (1.0, 1.1, 1.3))
    prior = {"prior_alpha": 3.0, "prior_beta": 2.0, "discount": 0.8, "idle_discount": 0.7}
    expected = {
        "plain": None,
        "fixed:2": Fixed(2),
        "threshold:0.4": Threshold(0.4),
        "beta": Beta(**prior),
        "beta:plain": Beta(**prior, censored=False),
        "calibrated": Calibrated(**prior, calibration=calibration, kappa=5.0, capacity=11.0),
        "cost_aware": CostAware(**prior, calibration=calibration, cost=costs.exit),
    }
    for name, controller in expected.items():
        spec = parse_controller(name, max_draft=2)
        setup = Setup(calibration=calibration, costs=costs, settings=settings)
        assert build_controller(spec, setup) == controller
        # With lookup they draft where it does not; plain stays plain.
        both = build_controller(spec, setup._replace(has_lookup=True))
        fixed = 2 if name == "fixed:2" else None  # which has nothing to choose
        assert both == (controller and Arms(controller, costs.exit, costs.look_up, **prior, fixed=fixed))


def test_controllers_without_a_branch():
    costs = RoundCosts((1.0, 1.0, 1.0), (1.0, 1.1, 1.3))
    for name, fixed in (("cost_aware", None), ("fixed:2", 2)):
        spec = parse_controller(name, max_draft=2)
        controller = build_controller(spec, Setup(calibration=Calibration(), costs=costs, has_branch=False, has_lookup=True))
        assert (controller.inner, controller.fixed, controller.look_cost) == (None, fixed, costs.look_up)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("prior_alpha", (0.0, -1.0, float("nan"), float("inf"))),
        ("prior_beta", (0.0, -1.0, float("nan"), float("inf"))),
        ("capacity", (0.0, -1.0, float("nan"), float("inf"))),
        ("discount", (-0.1, 1.1, float("nan"))),
        ("idle_discount", (-0.1, 1.1, float("nan"))),
        ("kappa", (-1.0, float("nan"), float("inf"))),
    ],
)
def test_settings_that_make_no_posterior_are_refused(field: str, values: tuple[float, ...]):
    for value in values:
        with pytest.raises(UserError, match=f"^{field} is {value}; expected"):
            ControllerConfig(**{field: value})
