"""Every test sees eight CPU devices: sharded code runs the same on them as on a mesh of accelerators."""

import os

# Before JAX is imported. A machine with an accelerator must give the same numbers, so only the CPU is asked for.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
