"""`deltaw federate`: several organisations train one adapter, on this machine or over a network."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from deltaw.cli.console import Say, print_facts, print_json, print_table
from deltaw.cli.options import Flag, dashed, flags_of, given_values, merged_keys, with_flags
from deltaw.cli.pages import CONTEXT, EPILOG, Page, page
from deltaw.cli.train import train_flags
from deltaw.core.configs import aliases_of
from deltaw.core.errors import InputError, RunError, unknown_name
from deltaw.federated.config import FederationConfig, make_federation_config
from deltaw.methods import METHODS
from deltaw.train.config import TrainConfig, expanded

COMMANDS = {
    "credentials": "Make certificates and keys for the server and the nodes, and say what goes to whom.",
    "superlink": "Run the server that nodes connect to, until it is stopped.",
    "supernode": "Run one organisation's node, beside its rows, until it is stopped.",
    "start": "Start a federation over a running superlink, and wait for its end.",
    "ledger": "Show what an organisation's privacy ledger says was spent.",
}
EXAMPLES = ("fraud", "credit")
PANELS = {
    "Federation": (
        "rounds local_steps local_epochs rule rule_options weighting sample min_clients deadline_s attempts wait_s "
        "max_update_norm proximal_mu server_optimizer server_learning_rate server_momentum server_beta2 server_tau "
        "merge_every evaluate_every evaluate_clients parallel"
    ),
    "What travels": "compression compression_share secure threshold secure_weight_bound secure_clip",
}
_PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names.split()}
#: Keys of a training that mean nothing to a federation, or another thing.
_NOT_HERE = frozenset(
    "data eval_data held_out epochs max_steps adapter sharding early_stopping save_every keep_checkpoints log_every "
    "eval_every metric tensorboard evaluate_before".split()
)
#: What a key of a training is here, where that differs.
_HELP = {
    "test_data": "rows of no organisation's, on which every round's adapter is measured",
    "labels": "the names of the labels; by default those of all rows, where these are on this machine",
    "ledger": "with dp, a folder with a file for each organisation that sums up what all runs on its people's data "
    "cost, and refuses what would exceed its budget",
    "output": "the run folder; by default a new runs/federation-<n>",
}


class _Federate(TyperGroup):
    """Lists its commands on its page, and knows what is no command."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(page(self, ctx, COMMANDS))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name = args[0]
        if name not in COMMANDS and Path(name).suffix in (".yaml", ".yml"):
            raise InputError(f"{name} is no command of deltaw federate: give a configuration as --config {name}")
        if name not in COMMANDS:
            raise unknown_name("command of deltaw federate", name, COMMANDS)
        return super().resolve_command(ctx, args)


def _flags() -> list[Flag]:
    own = flags_of(
        FederationConfig, lambda name: _PANEL_OF.get(name, "Privacy of updates"), leave_out=("clients", "train")
    )
    theirs = [flag for flag in train_flags() if flag.name not in _NOT_HERE]
    return [*own, *(dataclasses.replace(flag, help=_HELP.get(flag.name, flag.help)) for flag in theirs)]


FLAGS = _flags()
app = typer.Typer(name="federate", add_completion=False, rich_markup_mode=None, context_settings=CONTEXT, cls=_Federate)


def federate(
    ctx: typer.Context,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="a YAML file of these keys (with underscores); flags win.", show_default=False
        ),
    ] = None,
    client: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="an organisation and its rows; given once for each, in place of the file's clients.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="go on with a federation from its last whole round, as it was started.",
            show_default=False,
        ),
    ] = None,
    example: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"run an example that comes with its rows: {' or '.join(EXAMPLES)}.",
            show_default=False,
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="with --example: all rules, epsilons 8, 3 and 1, and as many rounds as they need."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="print the run's record as one JSON object.")] = False,
    **given: Any,
) -> None:
    """Train one adapter among several organisations that do not show each other their rows.

    deltaw federate --config banks.yaml
    deltaw federate --client a=a.jsonl --client b=b.jsonl --test-data t.jsonl
    deltaw federate --example fraud

    Everything runs on this machine, as a rehearsal; the commands below run the same over a network.
    docs/federation.md says what protects whom from what.
    """
    if ctx.invoked_subcommand is not None:
        return
    values = given_values(FLAGS, given)
    if "rule_options" in values:
        values["rule_options"] = {key: int(x) if x.is_integer() else x for key, x in values["rule_options"].items()}
    command = shlex.join(["deltaw", *ctx.obj])
    other = [flag for flag, value in (("--config", config), ("--client", client)) if value]
    if resume is not None and (example or other or values):
        extra = ", ".join([*(["--example"] if example else []), *other, *map(dashed, values)])
        raise InputError(f"--resume goes on with the federation's own configuration: leave out {extra}")
    if example is not None:
        _example(example, other, values, full, command, json)
        return
    if full:
        raise InputError(f"--full goes with --example, which is {' or '.join(EXAMPLES)}: leave it out")
    made = None if resume is not None else configuration(config, values, client or [])
    folder = _resumable(resume or "") if made is None else Path(made.train.output)
    from deltaw.studies.catalogue import fetch_model
    from deltaw.studies.federate import resume_federation, run_federation

    with _saying_how_to_go_on(folder, f"deltaw federate --resume {shlex.quote(str(folder))}"), Say() as say:
        if made is None:
            run = resume_federation(folder, say=say)
        else:
            fetch_model(made.train.model, progress=say.bytes)
            run = run_federation(made, command=command, say=say)
    _told(run.record, run.path, json)


def configuration(file: str | None, values: dict[str, Any], clients: list[str]) -> FederationConfig:
    """The federation that a file and flags say; what the file names and is not here is looked for beside the file.

    Raises:
        InputError: nothing that says who takes part, or keys that contradict each other.
    """
    from deltaw.studies.deployment import located_keys

    keys = expanded(located_keys(file) if file is not None else {})
    values = expanded(values)
    method = values.get("method", keys.get("method", "lora"))
    foreign = [flag for flag in FLAGS if flag.name in values and flag.owners and method not in flag.owners]
    if foreign and method in METHODS:
        owners = ", ".join(foreign[0].owners)
        raise InputError(f"{foreign[0].option} is an option of {owners}, and the method is {method}: leave it out")
    aliases = dict(aliases_of(TrainConfig))
    if method in METHODS:
        aliases |= aliases_of(METHODS[method].config)
    if clients:
        keys["clients"] = _clients(clients)
    if "clients" not in keys and "data" in keys:
        raise InputError(
            f"{file} is a training's: a federation's has no data but clients: {{bank-a: {{data: FILE}}, ...}}; "
            "write those, or give --client NAME=FILE for each organisation"
        )
    if "clients" not in keys:
        raise InputError("nobody takes part: give --config banks.yaml, or --client NAME=FILE for each organisation")
    keys = merged_keys(keys, values, aliases)
    keys.setdefault("output", "")
    made = make_federation_config(keys)
    return made if made.train.output else make_federation_config({**keys, "output": str(_free())})


def _clients(entries: list[str]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not equals or not name or not path:
            raise InputError(f"--client is {entry!r}: expected NAME=FILE, such as bank-a=bank-a.jsonl")
        if name in found:
            raise InputError(f"--client names {name!r} twice: give each organisation once, with one file")
        found[name] = {"data": path}
    return found


def _free() -> Path:
    count = 1
    while (path := Path("runs") / f"federation-{count}").exists():
        count += 1
    return path


def _resumable(folder: str) -> Path:
    """A run's folder, if this command can go on with it."""
    from deltaw.train import RunFolder

    path = Path(folder)
    if not (path / "run.json").is_file():
        raise InputError(f"no run at {path}: expected a folder that deltaw federate wrote (with run.json in it)")
    record = RunFolder.open(path, writes=False).record
    if record.get("kind") != "federation":
        raise InputError(f"{path} is no federation: go on with it by deltaw train --resume {path}")
    if record.get("federation", {}).get("transport") == "flower":
        raise InputError(
            f"{path} ran over a network: go on with it by deltaw federate start --resume, as it was started"
        )
    return path


@contextlib.contextmanager
def _saying_how_to_go_on(folder: Path, command: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as stopped:
        if (folder / "run.json").is_file():
            stopped.add_note(f"go on with {command}")
        raise


def _example(name: str, extra: list[str], values: dict[str, Any], full: bool, command: str, json: bool) -> None:
    if name not in EXAMPLES:
        raise unknown_name("example", name, EXAMPLES)
    if extra:
        raise InputError(f"--example {name} brings its own organisations and rows: leave out {', '.join(extra)}")
    from deltaw.studies.consortium import run_example, tables

    with Say() as say:
        results = run_example(name, values, full=full, command=command, say=say, progress=say.bytes)
    if json:
        print_json(results)
    else:
        for title, table in tables(results):
            print_table(title, table)
        print_facts([("Numbers", results["numbers"]), ("Report", results["report"])])
    if failed := results["failed"]:
        raise RunError(f"{len(failed)} of {results['cells']['all']} cells failed; the same command tries them again")


def _told(record: dict[str, Any], folder: Path, json: bool) -> None:
    if json:
        print_json(record)
    else:
        show(record, folder)


def show(record: dict[str, Any], folder: Path) -> None:
    """What a federation came to, on stdout."""
    metrics = record.get("metrics", {})
    rows = [["", "before", "after"]]
    named = [("shared test rows", metrics), *((name, own) for name, own in metrics.get("silos", {}).items())]
    for name, own in named:
        for key in ("macro_auroc", "accuracy", "macro_f1", "f1", "perplexity", "loss"):
            if key in own.get("after", {}):
                before = own.get("before", {}).get(key)
                rows.append([f"{name}: {key}", "" if before is None else f"{before:.4f}", f"{own['after'][key]:.4f}"])
    print_table("Held-out rows", rows)
    cost, told = record.get("cost", {}), record.get("federation", {})
    facts = [("Held-out rows", "none, so nothing was measured")] if len(rows) == 1 else []
    facts += [
        ("Rule", f"{told.get('rule')}; {told.get('rounds')} rounds; {', '.join(told.get('clients', {}))}"),
        ("Traffic", f"{cost.get('bytes_up', 0) / 1e6:.2f} MB up, {cost.get('bytes_down', 0) / 1e6:.2f} MB down"),
    ]
    for name, own in ((record.get("privacy") or {}).get("clients") or {}).items():
        if "epsilon" in own:
            facts.append((f"Epsilon of {name}", f"{own['epsilon']:.4g}"))
    facts += [("Adapter", str(folder / "adapter")), ("Report", str(folder / "report.html"))]
    print_facts(facts)


app.callback(invoke_without_command=True, epilog=EPILOG)(with_flags(federate, FLAGS))


@app.command(name="credentials", epilog=EPILOG, cls=Page)
def credentials(
    folder: Annotated[str, typer.Option(metavar="FOLDER", help="where to write; one folder a party in it.")],
    server: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="a name or address of the server, beside localhost.", show_default=False),
    ] = None,
    nodes: Annotated[str | None, typer.Option(metavar="A,B,...", help="the organisations.", show_default=False)] = None,
    own: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="make one organisation's own keys, on its machine.", show_default=False),
    ] = None,
    days: Annotated[int, typer.Option(metavar="N", min=1, help="how long certificates last [default: 730]")] = 730,
) -> None:
    """Make certificates and keys, and say what goes to whom.

    deltaw federate credentials --folder keys --server fed.org --nodes a,b,c
    deltaw federate credentials --folder keys/a --own a
    """
    from deltaw.federated.flower.credentials import make_credentials, make_node_credentials, table

    if (own is None) == (nodes is None):
        raise InputError("give --nodes (for all parties) or --own NAME (for one organisation)")
    if own is not None:
        made = make_node_credentials(folder, name=own)
    else:
        names = [part.strip() for part in (nodes or "").split(",") if part.strip()]
        made = make_credentials(folder, server_names=server or [], nodes=names, days=days)
    print(table(made))


@app.command(name="superlink", epilog=EPILOG, cls=Page)
def superlink(
    config: Annotated[str, typer.Argument(metavar="FILE", help="the server's YAML file.", show_default=False)],
) -> None:
    """Run the server that nodes connect to, until it is stopped.

    deltaw federate superlink superlink.yaml
    """
    from deltaw.federated.flower.launch import read_deployment, run_superlink

    with Say() as say:
        run_superlink(**read_deployment(config, "superlink"), say=say)


@app.command(name="supernode", epilog=EPILOG, cls=Page)
def supernode(
    config: Annotated[str, typer.Argument(metavar="FILE", help="the node's YAML file.", show_default=False)],
) -> None:
    """Run one organisation's node, beside its rows, until it is stopped.

    deltaw federate supernode supernode.yaml
    """
    from deltaw.federated.flower.launch import read_deployment, run_supernode
    from deltaw.studies.deployment import SERVER, node_factory

    keys = read_deployment(config, "supernode")
    silo = keys.pop("silo")
    if set(silo) != {"config"} or not isinstance(silo["config"], str):
        raise InputError(f"silo in {config} is {silo!r}: expected silo: {{config: FILE}}, the organisation's own file")
    beside = Path(config).parent / silo["config"]
    file = beside if beside.exists() else silo["config"]
    factory = node_factory(keys["name"], config=file, credentials=keys["credentials"], state=keys["state"])
    with Say() as say:
        run_supernode(**keys, client=factory, server=SERVER, say=say)


@app.command(name="start", epilog=EPILOG, cls=Page)
def start(
    ctx: typer.Context,
    config: Annotated[str, typer.Option(metavar="FILE", help="the federation's YAML file.")],
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="of the running superlink.")],
    credentials: Annotated[str, typer.Option(metavar="FOLDER", help="the server's folder of credentials.")],
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in output from its last round.")] = False,
    json: Annotated[bool, typer.Option("--json", help="print the run's record as one JSON object.")] = False,
) -> None:
    r"""Start a federation over a running superlink, and wait for its end.

    deltaw federate start --config banks.yaml --superlink fed.org:9092 \
        --credentials keys/server

    Run it on the superlink's machine: the server's process reads test_data and writes output there.
    """
    from deltaw.federated.flower.launch import start_run
    from deltaw.studies.deployment import SERVER, server_options
    from deltaw.train import RunFolder

    made = configuration(config, {}, [])
    folder = Path(made.train.output)
    if resume and not folder.exists():
        raise InputError(f"no run at {folder} to go on with: name its folder as output in {config}")
    command = shlex.join(["deltaw", *ctx.obj])
    options = server_options(made, credentials=credentials, command=command, resuming=resume)
    again = command if resume else f"{command} --resume"
    with _saying_how_to_go_on(folder, again), Say() as say:
        start_run(superlink=superlink, credentials=credentials, server=SERVER, options=options, say=say)
    _told(RunFolder.open(folder, writes=False).record, folder, json)


@app.command(name="ledger", epilog=EPILOG, cls=Page)
def ledger(
    file: Annotated[str, typer.Argument(metavar="FILE", help="a ledger, as a run's key ledger names it.")],
    json: Annotated[bool, typer.Option("--json", help="print it as one JSON object.")] = False,
) -> None:
    """Show what an organisation's privacy ledger says was spent.

    deltaw federate ledger bank-a.jsonl
    """
    from deltaw.privacy.ledger import Ledger

    if not Path(file).is_file():
        raise InputError(f"no ledger at {file}: expected an organisation's file, as its run's key ledger names it")
    found = Ledger.open(file)
    spent, rows = found.spent(), found.table()
    if json:
        print_json(
            {
                "epsilon": spent.epsilon,
                "epsilon_rdp": spent.epsilon_rdp,
                "delta": found.delta,
                "budget_epsilon": found.budget_epsilon,
                "head": found.head,
                "charges": rows,
            }
        )
        return
    if rows:
        print_table("Charges", [list(rows[0]), *(list(row.values()) for row in rows)])
    print_facts(
        [
            ("Spent", f"epsilon {spent.epsilon:.4g} of {found.budget_epsilon:g} at delta {found.delta:g}"),
            ("Last line", found.head),
        ]
    )
