"""What stands at the two ends of a Flower run in tests; processes import it by name."""

import os
import signal


class Echo:
    """A client for the silo's worker process."""

    def __init__(self, name):
        self.name = name

    def handle(self, request):
        if request == b"die":
            os.kill(os.getpid(), signal.SIGKILL)
        return self.name.encode() + b":" + request


def serve_nothing(transport, options):
    """For bundles that are only compared."""
