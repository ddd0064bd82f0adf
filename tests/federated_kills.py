"""Runs federations that are killed by SIGKILL at every disk operation, or at steps of a round, and go on; prints JSON.

Each run is a fork of this process, which imports everything once and computes nothing itself.
`python federated_kills.py FOLDER plain|secure`
"""

import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

import torch
from federated_fakes import NAMES, Rough, make_client, make_config, secure_parts

from deltaw.federated.messages import Message, pack
from deltaw.federated.server import Server
from deltaw.federated.store import ServerStore
from deltaw.federated.transport import LocalTransport
from deltaw.federated.wire import state_tensors


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_disk(count):
    """Kills at the `count`-th disk operation; gives the counter."""
    seen = [0]

    def counted(function):
        def wrapped(*given, **named):
            seen[0] += 1
            if seen[0] == count:
                die()
            return function(*given, **named)

        return wrapped

    for module, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (shutil, "rmtree")):
        setattr(module, name, counted(getattr(module, name)))
    return seen


def federate(folder, config, secure, stop=None):
    """One life of the server with its clients."""
    clients = {name: make_client(name, folder=folder / "books", secure=secure, log=folder / "log") for name in NAMES}

    def at(when):
        def look(name, request, *reply):
            if stop == (request.kind, when, name) and request.header["round"] == 1:
                die()
            return reply[0] if reply else None

        return look

    transport = Rough(LocalTransport(clients), at("after"), before=at("before"))
    roster = secure[1] if secure else None
    progress = Server(transport, config, ServerStore(folder / "run"), run="run-1", secure=roster).run()
    (folder / "end").write_bytes(pack(Message("end", {}, state_tensors(progress.state))))


def forked(work):
    """The exit status of a fork that does `work`."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def lives(folder, config, secure, *, disk=None, stop=None):
    """A life that ends early and one that goes on: what they left, for the comparison."""
    folder.mkdir()

    def first():
        seen = kill_at_disk(disk)
        federate(folder, config, secure, stop)
        (folder / "count").write_text(str(seen[0]))

    codes = [forked(first)]
    if codes[0] != 0:
        codes.append(forked(lambda: federate(folder, config, secure)))
    lines = (folder / "run" / "rounds.jsonl").read_text().splitlines() if codes[-1] == 0 else []
    states = sorted(path.name for path in (folder / "run" / "state").glob("*"))
    count = int((folder / "count").read_text()) if (folder / "count").exists() else 0
    trained = (folder / "log").read_text().splitlines() if (folder / "log").exists() else []
    end = (folder / "end").read_bytes().hex() if (folder / "end").exists() else ""
    return {"codes": codes, "lines": lines, "states": states, "count": count, "trained": trained, "end": end}


def main():
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    secure = None
    keys = {"rounds": 2, "rule": "sketch", "weighting": "equal", "min_clients": 2}
    if kind == "secure":
        keys |= {"secure": True, "threshold": 2, "min_clients": 3}
    config = make_config(NAMES, **keys)
    if kind == "secure":
        secure = secure_parts(NAMES, config, phases=2)
    found = {"whole": lives(folder / "whole", config, secure)}
    steps = ["train", "phase", "evaluate"]
    if kind == "secure":
        steps += ["secure-advertise", "secure-share", "secure-agree", "secure-unmask"]
    for step in steps:
        for when, name in (("before", "bank-b"), ("after", "bank-c")):
            label = f"{step} {when} {name}"
            found[label] = lives(folder / label.replace(" ", "-"), config, secure, stop=(step, when, name))
    if kind == "plain":
        for count in range(1, found["whole"]["count"] + 1, int(sys.argv[3])):
            found[f"disk {count}"] = lives(folder / f"disk-{count}", config, secure, disk=count)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
