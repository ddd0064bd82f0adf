"""A federation over a network: what runs in the server's process, and what makes a bank's client at its node."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltaw.core.errors import InputError
from deltaw.federated.client import Client
from deltaw.federated.config import FederationConfig, make_federation_config
from deltaw.federated.transport import Factory, Transport
from deltaw.studies.federate import TRAINERS, make_client, run_federation
from deltaw.train.config import read_yaml

#: Called in the server's process, as `package.module:function`; nodes compare it, since it is part of what they run.
SERVER = "deltaw.studies.deployment:serve"
IDENTITY, ROSTER = "identity.key", "peers.txt"


def serve(transport: Transport, options: Mapping[str, Any]) -> None:
    """Runs the federation of `server_options` over `transport`.

    Raises:
        InputError, RunError: as `run_federation`.
    """
    config = make_federation_config(options["keys"])
    run_federation(
        config,
        command=options["command"],
        say=lambda line: print(line, flush=True),
        resuming=options["resuming"],
        transport=transport,
        roster=options["roster"],
        trainers=options.get("trainers", TRAINERS),
    )


def server_options(
    config: FederationConfig,
    *,
    credentials: str | Path,
    command: str,
    resuming: bool = False,
    trainers: str = TRAINERS,
) -> dict[str, Any]:
    """What `serve` is told: JSON-able, without secrets, as nodes see it too; paths are those of the server's machine."""
    keys = config.plain()
    # Where the banks' rows lie is their own business.
    keys["clients"] = {name: {} for name in config.clients}
    if keys.get("labels") is None and keys.get("task") != "causal-lm":
        keys["labels"] = None
    for name in ("output", "test_data"):
        if keys.get(name):
            keys[name] = str(Path(keys[name]).resolve())
    roster = Path(credentials).resolve() / ROSTER
    return {
        "keys": keys,
        "command": command,
        "resuming": resuming,
        "roster": str(roster) if config.secure else None,
        "trainers": trainers,
    }


def node_factory(*, config: str | Path, credentials: str | Path, state: str | Path) -> Factory:
    """What makes the client of a node: from the bank's YAML file, its keys' folder, and a folder for its books.

    Raises:
        InputError: no such file, or one that no federation can be made of.
    """
    path = Path(config).resolve()
    keys = read_yaml(path)
    keys["clients"] = _located(keys.get("clients"), path.parent)
    make_federation_config({**keys, "output": ""})
    options = {
        "keys": keys,
        "credentials": str(Path(credentials).resolve()),
        "folder": str(Path(state).resolve() / "books"),
    }
    return Factory("deltaw.studies.deployment:node_client", options)


def node_client(
    name: str, *, keys: Mapping[str, Any], credentials: str, folder: str, trainers: str = TRAINERS
) -> Client:
    """The client of the bank called `name`, at its own node.

    Raises:
        InputError: a file that does not say where this bank's rows are.
    """
    own = dict(keys.get("clients") or {}).get(name)
    if not own or not own.get("data"):
        raise InputError(
            f"the bank's file does not say where its rows are: expected clients: {{{name}: {{data: FILE}}}}"
        )
    secure = bool(keys.get("secure", False))
    return make_client(
        name,
        keys=keys,
        folder=folder,
        trainers=trainers,
        identity=str(Path(credentials) / IDENTITY) if secure else None,
        roster=str(Path(credentials) / ROSTER) if secure else None,
    )


def _located(clients: Any, root: Path) -> Any:
    """Files of a bank's rows as absolute paths: relative ones start at its YAML file."""
    if not isinstance(clients, Mapping):
        return clients
    return {
        name: {key: str(root / value) if value else value for key, value in (own or {}).items()}
        for name, own in clients.items()
    }
