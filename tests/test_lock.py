"""requirements.lock, from which the Makefile installs, holds what pyproject.toml asks for."""

import pathlib
import tomllib

from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parent.parent
# Extras for hardware or programs that the tests do not have.
NOT_LOCKED = ("cuda", "tpu", "peers")


def test_the_lock_file_holds_a_version_of_every_dependency_that_pyproject_takes():
    locked = {}
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            locked[normalized(name)] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *(line for name, lines in extras.items() if name not in NOT_LOCKED for line in lines)]
    for requirement in map(Requirement, asked):
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(locked[normalized(requirement.name)]), requirement


def normalized(name: str) -> str:
    return name.lower().replace("_", "-")
