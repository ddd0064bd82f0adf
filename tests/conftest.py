"""Puts this folder on the path, so that tests of every room can import `tiny`; and what several rooms' tests do."""

import os
import subprocess
import sys

import pytest

# Several workers with a thread for every core each would wait for one another; torch reads this when it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def passes_in_the_interpreter():
    """Runs a file's tests again with Triton's interpreter, which is chosen for a whole process."""

    def run(file, selected):
        command = [sys.executable, "-m", "pytest", file, "-p", "no:cacheprovider", "-k", selected]
        done = subprocess.run(
            command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "passed" in done.stdout and "skipped" not in done.stdout

    return run
