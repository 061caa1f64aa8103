"""What must stand in the environment before jax and huggingface_hub are imported, and fixtures of several files."""

import os

import pytest

# Eight CPU devices for the tests of sharding; everything else runs on the first one and is not slowed.
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8"
# No test may reach for the network behind our back.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_module():
    """Compiled programs go with the module that used them: each holds dozens of memory maps, and Linux gives a process 65,530."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture(params=["this machine's", "narrow"])
def registers(request, monkeypatch):
    """Kernels as they are compiled for this machine, and as for one without AVX-512."""
    from eesd_jax.kernels.cpu import attention, calls, codes, rows

    if request.param == "narrow":
        monkeypatch.setattr(calls, "registers", lambda: calls.Registers(lanes=8, rows=2))
        for kernel in (attention, codes, rows):
            monkeypatch.setattr(kernel, "TARGET", f"{kernel.TARGET}_narrow")
