"""libtpu, the TPU's runtime and compiler, on machines that have no TPU."""

from __future__ import annotations

import glob
import importlib.util
import os

ALONE = {
    # it would ask the cloud what machine this is
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # whatever is planned for: unset, it complains
    # several processes may compile at the same time: none of them takes a device
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""Environment variables by which it does not look for a machine around it."""
_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")


def quiet_without_tpu() -> None:
    """Where it is installed, for `read-jax plan`, but no TPU is: else every command would begin with its
    complaints. Before JAX looks for its devices; what is set already stays."""
    if importlib.util.find_spec("libtpu") and not any(map(glob.glob, _DEVICES)):
        for name, value in ALONE.items():
            os.environ.setdefault(name, value)
