"""What stands in the environment of tests and of the processes that they start; it must be there before jax is imported.

A test compiles far longer than it runs. XLA is therefore told to compile quickly, and what it has compiled is kept for the run:
for all of its processes, and after `jax.clear_caches()`. Whoever sets XLA_FLAGS, also to nothing, gets what those say:
`XLA_FLAGS= make test` runs the programs that users run.
"""

import os
import tempfile

_DEVICES = "--xla_force_host_platform_device_count"
# Of 9.4 s for the program of speculative rounds of a tiny model, 2.2 s are left.
_QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
_CACHE = "JAX_COMPILATION_CACHE_DIR"


def xla_flags(devices: int) -> str:
    """The flags of this run for a process with so many CPU devices."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", _QUICK).split() if not flag.startswith(_DEVICES)]
    return " ".join([*flags, f"{_DEVICES}={devices}"])


def prepare() -> tempfile.TemporaryDirectory | None:
    """Sets the variables; the folder of what is compiled, if this process is the first of the run."""
    # Eight devices for the tests of sharding; everything else runs on the first one and is not slowed.
    os.environ["XLA_FLAGS"] = xla_flags(8)
    # No test may reach for the network behind our back.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if _CACHE in os.environ:
        return None
    folder = tempfile.TemporaryDirectory(prefix="compiled-", ignore_cleanup_errors=True)
    os.environ |= {_CACHE: folder.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return folder
