"""A federation, from a configuration to a run folder with a page: the whole story in `run_federation`."""

from __future__ import annotations

import contextlib
import importlib
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deltaw.checkpoint.algebra import read_stored, write_stored
from deltaw.checkpoint.factored import stacked
from deltaw.core.errors import DeltawError, InputError, RunError
from deltaw.core.protocols import LowRank
from deltaw.federated.client import Client
from deltaw.federated.config import FederationConfig, make_federation_config
from deltaw.federated.rules import make_rule
from deltaw.federated.secure_exchange import SecureRoster
from deltaw.federated.server import Server
from deltaw.federated.state import GlobalState, Layout
from deltaw.federated.store import ClientStore, Progress, ServerStore
from deltaw.federated.transport import Factory, LocalTransport, ProcessTransport, Transport
from deltaw.report import write_report
from deltaw.train import RunFolder
from deltaw.train.config import read_yaml
from deltaw.train.run_folder import peak_memory_bytes

if TYPE_CHECKING:
    from deltaw.federated.secure import SecureSettings
    from deltaw.privacy.updates import UpdateNoise, UpdatePlan

Say = Callable[[str], None]

#: What makes a client's trainer, and the server's own (for the name None), as `module:function`.
TRAINERS = "deltaw.studies.silo:make_trainer"

_CLIENTS, _IDENTITY, _ROSTER = "clients", "identity.pem", "roster.txt"
#: What a client's account of its privacy says of the federation as a whole, and of itself.
_PRIVACY = (
    "level", "unit", "adjacency", "sampling", "delta", "noise", "noise_clients", "noise_multiplier", "max_grad_norm",
)  # fmt: skip
_PRIVACY_OF_ONE = ("epsilon", "target_epsilon", "epsilon_rdp", "steps", "sampling_rate", "collusion")


def _silent(line: str) -> None:
    pass


def run_federation(
    config: FederationConfig,
    *,
    command: str = "dw.run_federation(...)",
    say: Say = _silent,
    resuming: bool = False,
    transport: Transport | None = None,
    roster: str | Path | None = None,
    trainers: str = TRAINERS,
) -> RunFolder:
    """Trains one adapter among several organisations: meets the clients, runs the rounds, saves and reports.

    Args:
        config: of the federation.
        command: what `run.json` says that started it.
        say: takes lines of progress.
        resuming: goes on with the run in `output` from its last whole round.
        transport: to clients elsewhere; None runs them on this machine.
        roster: the file of the clients' public keys, for secure aggregation over `transport`.
        trainers: `module:function` that makes a trainer from the configuration and a client's name.

    Returns:
        The run folder, with `adapter/` in PEFT's layout: what rounds carried beside the factors is in it, so that its
        rank may be higher than the one that was trained.

    Raises:
        InputError: a configuration or clients that do not go together.
        RunError: a round that had too few updates, or no client moved the adapter; what was done is kept.
    """
    began = time.monotonic()
    run = _opened(config, command, resuming, "local" if transport is None else "flower")
    if resuming and run.record.get("status") == "done":
        say(f"{run.path} is done already")
        return run
    with _recorded(run):
        # Without rows of its own the server has a client's trainer to save by; clients' own files name no others' rows.
        saves_as = (
            None if config.train.test_data else next((n for n, c in config.clients.items() if c.get("data")), None)
        )
        own = _make(trainers)(config, saves_as)
        start, layout = own.initial()
        secure = _secure(config, run.path, roster, layout, local=transport is None)
        to_clients = transport or _local_transport(config, run.path, trainers)
        try:
            server = Server(
                to_clients,
                config,
                ServerStore(run.path),
                run=run.record["federation"]["run"],
                judge=own if config.train.test_data is not None else None,
                base=own.describe()["base"],
                secure=secure,
                say=say,
            )
            progress = server.run()
            said = server.finish()
        finally:
            to_clients.close()
        _check_moved(start, progress, run.path)
        save_global(own, progress, run.path / "adapter")
        _finish(run, config, progress, own.describe(), said, time.monotonic() - began)
    run.save(status="done")
    write_report(run.path)
    return run


def resume_federation(folder: str | Path, *, say: Say = _silent, **parts: Any) -> RunFolder:
    """Goes on with a federation from its last whole round, with the configuration it was started with.

    Raises:
        InputError: no federation there.
    """
    path = Path(folder)
    if not (path / "config.yaml").is_file():
        raise InputError(f"no run at {path}: expected a folder that deltaw federate wrote (with config.yaml in it)")
    config = make_federation_config({**read_yaml(path / "config.yaml"), "output": str(path)})
    return run_federation(config, say=say, resuming=True, **parts)


def make_client(
    name: str,
    *,
    keys: Mapping[str, Any],
    folder: str,
    trainers: str = TRAINERS,
    identity: str | None = None,
    roster: str | None = None,
    passphrase: str | None = None,
    explain: bool = False,
) -> Client:
    """A client, from plain values: what worker processes and the nodes of a network call.

    Args:
        name: of the organisation.
        keys: the configuration's, flat.
        folder: for the client's books; this organisation's alone.
        trainers: as for `run_federation`.
        identity: the file of the organisation's identity key, for secure aggregation.
        roster: the file of all clients' public keys.
        passphrase: of the identity key.
        explain: whether the server is told why anything failed; only where both are one user's.

    Raises:
        InputError: a configuration that does not name the client, or secure aggregation without keys.
    """
    config = make_federation_config(keys)
    if name not in config.clients:
        raise InputError(f"the configuration has no client {name!r}: its clients are {', '.join(config.clients)}")
    machine = None
    if config.secure:
        if identity is None or roster is None:
            raise InputError("secure is true: give the files of this client's identity key and of all public keys")
        from deltaw.federated.secure import IdentityKey, SecureClient, read_roster

        key = IdentityKey.load(identity, passphrase=passphrase)
        machine = SecureClient(name, key, _peers(config, read_roster(roster)), settings=secure_settings(config))
    trainer = _make(trainers)(config, name)
    privacy = _update_noise(config, name, trainer.initial()[1]) if config.update_dp else None
    return Client(name, trainer, ClientStore(folder), secure=machine, privacy=privacy, explain=explain)


def update_plan(config: FederationConfig, layout: Layout) -> UpdatePlan:
    """How clients clip and noise their changes under `update_dp`, the same from the same configuration and adapter.

    Raises:
        InputError: a target that no noise keeps to, or noise beyond what a secure sum's words hold.
    """
    from deltaw.privacy.updates import plan_updates

    assert config.update_clip is not None and config.update_delta is not None
    asked: dict[str, Any] = {
        "clip": float(config.update_clip),
        "noise_multiplier": config.update_noise_multiplier,
        "target_epsilon": config.update_target_epsilon,
        "rounds": config.rounds,
        "delta": config.update_delta,
        "clients": len(config.clients),
    }
    if config.secure:
        from deltaw.federated.secure.ring import LIMIT

        rule = make_rule(config.rule, **config.rule_options)
        sizes = {key: math.prod(shape) for key, shape in layout.shapes.items()}
        sent = (sum(sizes[key] for key in rule.trained(round_, layout)) for round_ in range(config.rounds))
        asked |= {"stay": config.stay, "largest": LIMIT // config.sampled, "dim": max(sent)}
    return plan_updates(**asked)


def secure_settings(config: FederationConfig) -> SecureSettings:
    """What the clients of a secure federation agree on, the same from the same configuration."""
    from deltaw.federated.secure import SecureSettings

    return SecureSettings(
        threshold=config.stay if config.update_dp else config.threshold,
        phases=make_rule(config.rule, **config.rule_options).phases,
        clip=None if config.update_dp else config.secure_clip,
        weight_bound=config.secure_weight_bound if config.weighting == "examples" else 1,
    )


def save_global(own: Any, progress: Progress, folder: Path) -> None:
    """Writes the global adapter in PEFT's layout, what was carried and folded stacked onto each site's factors.

    Args:
        own: the server's trainer; its `save(state, folder)` writes a state as an adapter.
        progress: the server's last.
        folder: to write.
    """
    own.save(progress.state, folder)
    beside = [progress.state.carried, *progress.folds]
    if not any(beside):
        return
    stored = read_stored(folder)
    sites = {}
    for path, low in stored.sites.items():
        lows = [low, *(carried[path] for carried in beside if path in carried)]
        whole = stacked(lows, [1.0] * len(lows))
        sites[path] = LowRank(whole.A.to(low.A.dtype), whole.B.to(low.B.dtype), 1.0)
    write_stored(stored.with_sites(sites), folder)


# Parts of the story.


def _make(path: str) -> Any:
    module, _, function = path.partition(":")
    return getattr(importlib.import_module(module), function)


def _opened(config: FederationConfig, command: str, resuming: bool, transport: str) -> RunFolder:
    if not config.train.output:
        raise InputError("no output: name the run folder to write")
    if resuming:
        run = RunFolder.open(config.train.output)
        if run.record.get("kind") != "federation":
            raise InputError(f"{run.path} is no federation: go on with deltaw train --resume {run.path}")
        if run.record.get("status") == "done":
            return run
        run.record.pop("error", None)
    else:
        lacking = [name for name, own in config.clients.items() if not own.get("data")]
        if lacking and transport == "local":
            raise InputError(f"client {lacking[0]} has no data: expected {lacking[0]}: {{data: FILE}}")
        run = RunFolder.create(config.train.output, config=config.plain(), command=command)
        run.record["federation"] = {"run": secrets.token_hex(16)}
    keys = ("rule", "rounds", "secure", "compression", "weighting")
    run.record["federation"] |= {key: getattr(config, key) for key in keys} | {"transport": transport}
    run.save(kind="federation", status="running", model={"source": config.train.model})
    return run


@contextlib.contextmanager
def _recorded(run: RunFolder) -> Iterator[None]:
    """Writes into `run.json` how the run failed, if it did; the page shows the rounds before."""
    try:
        yield
    except BaseException as error:
        line = "interrupted" if isinstance(error, KeyboardInterrupt) else " ".join(str(error).split())
        with contextlib.suppress(DeltawError, OSError):
            run.save(status="failed", error=line or type(error).__name__)
            if (run.path / "rounds.jsonl").exists():
                write_report(run.path)
        raise


def _peers(config: FederationConfig, found: Mapping[str, Any]) -> dict[str, Any]:
    if lacking := sorted(set(config.clients) - set(found)):
        raise InputError(f"no public key of {', '.join(lacking)}: ask for it, and add its line to the file")
    return {name: found[name] for name in config.clients}


def _update_noise(config: FederationConfig, name: str, layout: Layout) -> UpdateNoise:
    from deltaw.privacy.ledger import Ledger
    from deltaw.privacy.updates import UpdateNoise

    ledger = None
    if config.update_ledger is not None:
        file = Path(config.update_ledger)
        if file.suffix == "" or file.is_dir():
            file = file / f"{name}.jsonl"
        delta = None if config.update_budget_epsilon is None else config.update_delta
        ledger = Ledger.open(file, config.update_budget_epsilon, delta, unit="client")
    return UpdateNoise(update_plan(config, layout), name=name, ledger=ledger)


def _check_moved(start: GlobalState, progress: Progress, folder: Path) -> None:
    """Fails a run that has come to nothing, as with a learning rate of zero or tensors that no loss depends on.

    Raises:
        RunError: the adapter computes what it did at its start.
    """
    tensors = progress.state.tensors
    nothing = set()
    for _, key_A, key_B, _ in progress.layout.sites():
        # Rules that carry updates beside the factors draw those anew, or empty them.
        ends, began = ([held[key] for key in (key_A, key_B)] for held in (tensors, start.tensors))
        if not any(value.any() for value in ends) and not all(value.any() for value in began):
            nothing |= {key_A, key_B}
    beside = [low for carried in (progress.state.carried, *progress.folds) for low in carried.values()]
    if any(low.A.any() and low.B.any() for low in beside) or any(
        key not in nothing and not torch.equal(value, start.tensors[key]) for key, value in tensors.items()
    ):
        return
    raise RunError(
        f"the adapter is where it began after {progress.done} rounds: no client moved it (look at learning_rate, "
        f"local_steps and what is trained); the rounds are kept in {folder}"
    )


def _secure(
    config: FederationConfig, folder: Path, roster: str | Path | None, layout: Layout, *, local: bool
) -> SecureRoster | None:
    """The participants of secure aggregation; on one machine keys are made for them where there are none yet."""
    if not config.secure:
        return None
    from deltaw.federated.secure import IdentityKey, read_roster, write_roster

    integers = update_plan(config, layout) if config.update_dp else None
    if not local:
        if roster is None:
            raise InputError("secure is true: give the file of the clients' public keys")
        return SecureRoster(_peers(config, read_roster(roster)), secure_settings(config), integers)
    keys = {}
    for name in config.clients:
        path = folder / _CLIENTS / name / _IDENTITY
        if not path.exists():
            IdentityKey.make().save(path)
        keys[name] = IdentityKey.load(path).public
    write_roster(folder / _CLIENTS / _ROSTER, keys)
    return SecureRoster(keys, secure_settings(config), integers)


def _local_transport(config: FederationConfig, folder: Path, trainers: str) -> Transport:
    clients = folder.resolve() / _CLIENTS
    keys = config.plain()
    options: dict[str, dict[str, Any]] = {}
    for name in config.clients:
        own = {"keys": keys, "folder": str(clients / name / "books"), "trainers": trainers, "explain": True}
        if config.secure:
            own |= {"identity": str(clients / name / _IDENTITY), "roster": str(clients / _ROSTER)}
        options[name] = own
    if config.parallel:
        factories = {name: Factory("deltaw.studies.federate:make_client", own) for name, own in options.items()}
        return ProcessTransport(factories, workers=config.parallel)
    return LocalTransport({name: make_client(name, **own) for name, own in options.items()})


def _finish(
    run: RunFolder,
    config: FederationConfig,
    progress: Progress,
    own: Mapping[str, Any],
    said: Mapping[str, Mapping[str, Any]],
    seconds: float,
) -> None:
    lines = ServerStore(run.path).lines()
    run.record["model"] |= own.get("model", {})
    run.record["federation"]["clients"] = {
        name: {key: told[key] for key in ("examples", "base", "versions") if told.get(key) is not None}
        for name, told in sorted(said.items())
    }
    layout = progress.layout
    run.save(
        task=own.get("task") or config.train.task,
        method={"name": layout.method, "config": dict(layout.config)},
        privacy=_privacy(said),
        metrics=_metrics(lines) | ({"labels": own["labels"]} if own.get("labels") else {}),
        cost={
            "total_s": round(run.record.get("cost", {}).get("total_s", 0) + seconds, 3),
            "bytes_up": int(progress.totals["bytes_up"]),
            "bytes_down": int(progress.totals["bytes_down"]),
            "peak_memory_bytes": peak_memory_bytes(torch.device("cpu")),
        },
    )


def _privacy(said: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the clients say of their privacy, together; None where none does."""
    told = {name: one["privacy"] for name, one in sorted(said.items()) if isinstance(one.get("privacy"), dict)}
    if not told:
        return None
    # Where organisations differ the weakest word would be a guess: each one's own stands in its entry.
    first = next(iter(told.values()))
    same = {
        key: first[key] for key in _PRIVACY if key in first and all(one.get(key) == first[key] for one in told.values())
    }
    own = {
        name: {key: one[key] for key in (*_PRIVACY_OF_ONE, *_PRIVACY) if key in one and key not in same}
        for name, one in told.items()
    }
    return {**same, "clients": own}


def _metrics(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The first and the last measurement, of the server and of each client."""
    found: dict[str, Any] = {}
    for key, line in [("before", line) for line in lines[:1]] + [("after", line) for line in lines[1:]]:
        if line.get("metrics"):
            found[key] = line["metrics"]
        for name, silo in line.get("silos", {}).items():
            if silo.get("metrics"):
                found.setdefault("silos", {}).setdefault(name, {})[key] = silo["metrics"]
    return found
