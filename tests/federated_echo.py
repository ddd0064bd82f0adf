"""A client for tests of transports; imports nothing that takes time, as every worker process imports it."""

import os
import signal
import time


class Echo:
    """Answers with its own process id and the request; some requests are orders."""

    def __init__(self, name):
        self.name = name

    def handle(self, request):
        word = request.decode()
        if word.startswith("sleep"):
            time.sleep(float(word.split()[1]))
        if word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "raise":
            raise RuntimeError("no\nway")
        return f"{self.name} {os.getpid()} {word}".encode()


def make_echo(name):
    return Echo(name)
