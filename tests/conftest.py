"""Puts this folder on the path, so that tests of every room can import `tiny`."""

import os

# Several workers with a thread for every core each would wait for one another; torch reads this when it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
