"""What must stand in the environment before jax and huggingface_hub are imported."""

import os

# Eight CPU devices for the tests of sharding; everything else runs on the first one and is not slowed.
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8"
# No test may reach for the network behind our back.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
