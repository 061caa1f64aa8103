"""The surroundings of every test, fixtures of several files, and the times of a run."""

import resource
import time

import pytest
import surroundings

STARTED = time.monotonic()
COMPILED = surroundings.prepare()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the run cost: its workers, and what they started, have ended by now."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    terminalreporter.write_line(f"took {(time.monotonic() - STARTED) / 60:.1f} minutes, {cpu / 60:.1f} CPU-minutes")


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_module():
    """Compiled programs go with the module that used them: each holds dozens of memory maps, and Linux gives a process 65,530."""
    yield
    import jax

    jax.clear_caches()
