"""Clients whose training is arithmetic, configurations, and transports that lose, tear and repeat what they carry."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import torch

from deltaw.core.generators import generator
from deltaw.core.protocols import LowRank
from deltaw.federated.client import Client, LocalResult
from deltaw.federated.config import make_federation_config
from deltaw.federated.messages import Message, pack, unpack
from deltaw.federated.state import GlobalState, Layout
from deltaw.federated.store import ClientStore
from deltaw.federated.transport import TransportFailure

SHAPES = {"layer:lora_A": (2, 5), "layer:lora_B": (4, 2), "head:bias": (3,)}
BASE = "ab" * 32
NAMES = ("bank-a", "bank-b", "bank-c")


def layout(**changes):
    config = {"r": 2, "alpha": 4, "init": "default", "freeze_a": False}
    found = {"shapes": SHAPES, "scales": {"layer": 2.0}, "method": "lora", "config": config, "frozen": frozenset()}
    return Layout(**{**found, **changes})


def start_state():
    draw = generator(0, "start")
    tensors = {key: torch.randn(shape, generator=draw) for key, shape in SHAPES.items()}
    return GlobalState(tensors | {"layer:lora_B": torch.zeros(4, 2)})


def trained_change(name, round_, key, shape):
    """What a fake client adds to a tensor in a round."""
    return 0.1 * torch.randn(shape, generator=generator(7, name, round_, key))


class FakeTrainer:
    """Adds `trained_change`; writes a line for each training where `log` is given."""

    def __init__(self, name, *, examples=10, base=BASE, log=None, poison=None, die=None, layout_=None):
        self.name, self.examples, self.base, self.log, self.poison = name, examples, base, log, poison
        self.die, self.layout, self.folds = die, layout_ or layout(), []

    def _note(self, what, round_):
        if self.log is not None:
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(json.dumps([self.name, what, round_]) + "\n")
        if self.die is not None and self.die["at"] == f"{what}-{round_}" and not os.path.exists(self.die["flag"]):
            Path(self.die["flag"]).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def describe(self):
        return {"base": self.base, "layout": {}, "examples": self.examples, "versions": {"torch": "x"}}

    def initial(self):
        return start_state(), self.layout

    def train(self, start, *, trained, round_, rounds, run=""):
        self._note("train", round_)
        tensors = {k: start.tensors[k] + trained_change(self.name, round_, k, SHAPES[k]) for k in sorted(trained)}
        if self.poison == "nan":
            tensors["head:bias"] = tensors["head:bias"] / 0 * 0
        if self.poison == "raise":
            raise ValueError("row 3 is 'secret'")
        return LocalResult(tensors, self.examples, {"loss": 0.5, "epsilon": 1.0 + round_})

    def evaluate(self, state):
        self._note("evaluate", len(self.folds))
        return {"norm": float(sum(value.square().sum() for value in whole(state, self.folds).values()))}

    def fold(self, carried):
        self.folds.append(carried)


def whole(state, folds=()):
    """What a model computes with, in float64: the site's product with all that is carried and folded, and the rest."""
    B, A = state.tensors["layer:lora_B"].double(), state.tensors["layer:lora_A"].double()
    product = 2.0 * B @ A
    for carried in [state.carried, *folds]:
        for low in carried.values():
            product = product + low.scale * low.B.double() @ low.A.double()
    return {"layer": product, "head:bias": state.tensors["head:bias"].double()}


def expected_product(low: LowRank):
    return low.scale * low.B.double() @ low.A.double()


def make_config(names, **keys):
    clients = {name: {"data": "rows.jsonl"} for name in names}
    return make_federation_config({"clients": clients, "wait_s": 0, "seed": 3, **keys})


def secure_parts(names, config, *, phases=1, seed=None):
    """(identities, roster) of a secure federation."""
    from deltaw.federated.secure import IdentityKey, SecureSettings
    from deltaw.federated.secure_exchange import SecureRoster

    identities = {name: IdentityKey.make() for name in names}
    bound = config.secure_weight_bound if config.weighting == "examples" else 1
    settings = SecureSettings(threshold=config.threshold, phases=phases, clip=config.secure_clip, weight_bound=bound)
    return identities, SecureRoster({name: key.public for name, key in identities.items()}, settings)


def make_client(name, *, folder=None, secure=None, explain=False, **options):
    """A client with a fake trainer; also the factory of worker processes, which give plain options."""
    machine = None
    if secure is not None:
        from deltaw.federated.secure import SecureClient

        identities, roster = secure
        machine = SecureClient(name, identities[name], roster.peers, settings=roster.settings)
    store = ClientStore(None if folder is None else Path(folder) / name)
    return Client(name, FakeTrainer(name, **options), store, secure=machine, explain=explain)


class Rough:
    """A transport around another one, that spoils replies: `spoil(name, request, reply)` gives what arrives instead.

    `request` is unpacked; a `TransportFailure` may be given. With `before=True` the client never sees the request.
    """

    def __init__(self, inner, spoil, *, before=None):
        self.inner, self.spoil, self.before = inner, spoil, before

    def clients(self, *, wait_for, timeout_s):
        return self.inner.clients(wait_for=wait_for, timeout_s=timeout_s)

    def exchange(self, requests, *, deadline_s):
        lost = {}
        if self.before is not None:
            lost = {n: failure for n, r in requests.items() if (failure := self.before(n, unpack(r))) is not None}
        yield from lost.items()
        for name, reply in self.inner.exchange(
            {n: r for n, r in requests.items() if n not in lost}, deadline_s=deadline_s
        ):
            yield name, self.spoil(name, unpack(requests[name]), reply)

    def close(self):
        self.inner.close()


def changed(reply, *, kind=None, tensors=None, **header):
    """A reply with parts of it replaced, its checksum right."""
    message = unpack(reply)
    return pack(Message(kind or message.kind, {**message.header, **header}, tensors or message.tensors))


def dropper(seed, share):
    """Loses requests and replies at random, a share of each."""
    draw = random.Random(seed)

    def before(name, request):
        lost = request.kind not in ("hello", "initial") and draw.random() < share
        return TransportFailure("lost on the way there") if lost else None

    def spoil(name, request, reply):
        lost = request.kind not in ("hello", "initial") and draw.random() < share
        return TransportFailure("lost on the way back", late=True) if lost else reply

    return spoil, before


class Mortal:
    """A client that dies, once, before or after it handles a request of a kind in a round.

    `dies` is the death: a kill of this process, or of the object alone, which then begins anew from its books.
    """

    def __init__(self, make, *, kind, round_, when, dies):
        self.make, self.kind, self.round_, self.when, self.dies = make, kind, round_, when, dies
        self.client, self.died = make(), False

    def handle(self, request):
        message = unpack(request)
        fated = not self.died and message.kind == self.kind and message.header["round"] == self.round_
        if fated and self.when == "before":
            return self._die()
        reply = self.client.handle(request)
        return self._die() if fated else reply

    def _die(self):
        self.died = True
        self.dies()
        self.client = self.make()
        raise ConnectionResetError("died")


def make_mortal(name, *, deaths, **options):
    """The factory of a worker's client; each death, once over all its lives, as a file `flag` says."""
    client = make_client(name, **options)
    for kind, round_, when, flag in deaths:
        if not os.path.exists(flag):
            client = Mortal(lambda c=client: c, kind=kind, round_=round_, when=when, dies=lambda f=flag: _end(f))
    return client


def _end(flag):
    Path(flag).touch()
    os.kill(os.getpid(), signal.SIGKILL)


def fake_trainer(config, name):
    """What a run's `trainers` names; the server's own for the name None, which can save."""
    log = None if name is None else config.clients[name]["data"]
    return SavingTrainer(name or "server", examples=10, log=log)


class SavingTrainer(FakeTrainer):
    """Writes a state as a LoRA in PEFT's layout."""

    def describe(self):
        told = super().describe() | {"task": "sequence-classification", "labels": ["good", "bad"]}
        told |= {"model": {"family": "bert"}}
        if self.name == "server":
            return told
        own = {"level": "example", "unit": "example", "delta": 1e-5, "epsilon": 2.0 + len(self.name), "steps": 4}
        return told | {"privacy": own}

    def save(self, state, folder):
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"base_model.model.layer.lora_{x}.weight": state.tensors[f"layer:lora_{x}"] for x in "AB"}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["layer"], "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps(fields))
