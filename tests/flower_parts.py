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


class Regression:
    """A `Trainer` whose model is B A x, with an organisation's own rows."""

    def __init__(self, name):
        import torch

        from deltaw.core.generators import generator

        random = generator(0, "rows", name)
        self.x, self.y = torch.randn(40, 6, generator=random), torch.randn(40, 5, generator=random)

    def describe(self):
        return {"base": "0" * 64, "examples": len(self.x), "versions": {}}

    def initial(self):
        import torch

        from deltaw.core.generators import generator
        from deltaw.federated.state import GlobalState, Layout

        tensors = {"m:lora_A": torch.randn(3, 6, generator=generator(0, "start")), "m:lora_B": torch.zeros(5, 3)}
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        return GlobalState(tensors), Layout(shapes, {"m": 2.0}, "lora", {"r": 3})

    def train(self, start, *, trained, round_, rounds, run=""):
        import torch

        from deltaw.federated.client import LocalResult

        local = {key: start.tensors[key].clone().requires_grad_() for key in trained}
        optimizer = torch.optim.SGD(local.values(), lr=0.1)
        for _ in range(4):
            a, b = ({**start.tensors, **local}[f"m:lora_{half}"] for half in "AB")
            loss = (2.0 * self.x @ a.T @ b.T - self.y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return LocalResult({key: tensor.detach() for key, tensor in local.items()}, len(self.x), {})

    def evaluate(self, state):
        return {}

    def fold(self, carried):
        raise NotImplementedError


def make_client(name, store=None):
    from deltaw.federated.client import Client
    from deltaw.federated.store import ClientStore

    return Client(name, Regression(name), ClientStore(store))


def serve(transport, options):
    """Two rounds by deltaw's own server; the state is left in a file."""
    from safetensors.torch import save_file

    from deltaw.federated.config import FederationConfig
    from deltaw.federated.server import Server
    from deltaw.federated.store import ServerStore

    config = FederationConfig(
        clients={name: {"data": "own"} for name in options["names"]},
        rounds=2,
        local_steps=4,
        evaluate_clients=False,
        deadline_s=120.0,
        wait_s=60.0,
        min_clients=len(options["names"]),
    )
    server = Server(transport, config, ServerStore(options["out"]), run="run-1", say=print)
    progress = server.run()
    server.finish()
    save_file(dict(progress.state.tensors), options["out"] + "/state.safetensors")


def serve_large(transport, options):
    """One exchange of many bytes, each way."""
    payload = os.urandom(options["bytes"])
    (name,) = transport.clients(wait_for=1, timeout_s=60.0)
    (answer,) = transport.exchange({name: payload}, deadline_s=200.0)
    assert answer == (name, name.encode() + b":" + payload)


def serve_failing(transport, options):
    """Ends as a server does that cannot go on."""
    from deltaw.core.errors import RunError

    raise RunError("the rows ran out")
