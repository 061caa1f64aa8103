"""What the tests of `infer/generate.py` share: the command, loaded once a file, and models for it."""

import signal

import generate_command
import pytest


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    with generate_command.loaded(tmp_path_factory.mktemp("cache")) as command:
        yield command


@pytest.fixture
def run(command, monkeypatch, tmp_path):
    """Runs the command in this process, in an empty folder; as if with --exit_branch=none, which warns of nothing, and without lookup."""
    monkeypatch.chdir(tmp_path)
    return command


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    return generate_command.write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def heeds_sigint():
    """Processes started meanwhile heed it, although ours may be one that was started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
