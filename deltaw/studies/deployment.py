"""A federation over a network: what runs in the server's process, and what makes a bank's client at its node."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltaw.core.errors import InputError
from deltaw.data.sources import local_file
from deltaw.federated.client import Client
from deltaw.federated.config import FederationConfig, make_federation_config
from deltaw.federated.transport import Factory, Transport
from deltaw.studies.federate import make_client, run_federation
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
    )


def server_options(
    config: FederationConfig, *, credentials: str | Path, command: str, resuming: bool = False
) -> dict[str, Any]:
    """What `serve` is told: JSON-able and without secrets, as nodes see it too; paths are the server's machine's.

    Raises:
        InputError: nothing that tells the server the task.
    """
    train = config.train
    if not train.test_data and (train.task is None or (train.task.endswith("classification") and train.labels is None)):
        raise InputError(
            "nothing tells the server the task: give test_data, rows of its own, or task (and labels, where it has "
            "classes)"
        )
    keys = config.plain()
    # Where the organisations' rows lie, and what they keep books in, is their own business.
    keys |= {"clients": {name: {} for name in config.clients}, **dict.fromkeys(("ledger", "budget_epsilon"))}
    keys |= {name: None for name in keys if name in ("update_ledger", "update_budget_epsilon")}
    for name in ("output", "test_data", "model"):
        if keys.get(name) and (name != "model" or Path(keys[name]).exists()):
            keys[name] = str(Path(keys[name]).resolve())
    roster = str(Path(credentials).resolve() / ROSTER) if config.secure else None
    return {"keys": keys, "command": command, "resuming": resuming, "roster": roster}


def located_keys(file: str | Path) -> dict[str, Any]:
    """The keys of a federation's YAML file; files of rows, and a model's folder, may be named from where the file is.

    Raises:
        InputError: no such file, or no YAML.
    """
    keys, root = read_yaml(file), Path(file).parent

    def beside(value: Any) -> Any:
        there = isinstance(value, str) and value and not Path(value).exists() and (root / value).exists()
        return str(root / value) if there else value

    if isinstance(keys.get("clients"), Mapping):
        keys["clients"] = {
            name: {key: beside(value) for key, value in own.items()} if isinstance(own, Mapping) else own
            for name, own in keys["clients"].items()
        }
    return keys | {name: beside(keys[name]) for name in ("test_data", "model") if name in keys}


def node_factory(name: str, *, config: str | Path, credentials: str | Path, state: str | Path) -> Factory:
    """What makes the client of a node: from the bank's YAML file, its keys' folder, and a folder for its books.

    Args:
        name: of the bank.
        config: its file: the federation's keys, and of `clients` its own rows.
        credentials: its folder of keys.
        state: of the node; the client's books are below it.

    Raises:
        InputError: no such file, one that no federation can be made of, or one that does not say where the rows are.
    """
    keys = located_keys(config)
    root = Path(config).resolve().parent
    made = make_federation_config({**keys, "output": ""})
    own = made.clients.get(name, {})
    if not own.get("data"):
        raise InputError(f"{config} does not say where {name}'s rows are: expected clients: {{{name}: {{data: FILE}}}}")
    for file in filter(None, own.values()):
        local_file(file)
    # Services are started in any folder: a ledger that is looked for elsewhere would begin anew.
    keys |= {key: str(root / keys[key]) for key in ("ledger", "update_ledger") if keys.get(key)}
    options = {
        "keys": keys,
        "credentials": str(Path(credentials).resolve()),
        "folder": str(Path(state).resolve() / "books"),
    }
    return Factory("deltaw.studies.deployment:node_client", options)


def node_client(name: str, *, keys: Mapping[str, Any], credentials: str, folder: str) -> Client:
    """The client of the bank called `name`, at its own node."""
    secure = bool(keys.get("secure", False))
    return make_client(
        name,
        keys=keys,
        folder=folder,
        identity=str(Path(credentials) / IDENTITY) if secure else None,
        roster=str(Path(credentials) / ROSTER) if secure else None,
    )
