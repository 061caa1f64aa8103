"""What the tests of kernels share."""

import pytest

from eesd_jax.kernels.cpu import attention, calls, codes, rows


@pytest.fixture(params=["this machine's", "narrow"])
def registers(request, monkeypatch):
    """Kernels as they are compiled for this machine, and as for one without AVX-512."""
    if request.param == "narrow":
        monkeypatch.setattr(calls, "registers", lambda: calls.Registers(lanes=8, rows=2))
        for kernel in (attention, codes, rows):
            monkeypatch.setattr(kernel, "TARGET", f"{kernel.TARGET}_narrow")
