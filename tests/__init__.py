"""The tests; whatever of probekit they import has its shapes checked."""

import os

import threadpoolctl

# what is read when libraries are imported: no test asks the hub, and of several workers none takes the others' cores
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    threadpoolctl.threadpool_limits(1)  # jaxtyping's plugin for pytest has imported numpy already

from tests import shapes as shapes
