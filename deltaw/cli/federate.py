"""`deltaw federate`: several organisations train one adapter, on this machine or over a network."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from deltaw.cli.console import Say, print_facts, print_json, print_table
from deltaw.cli.options import Flag, flags_of, given_values, with_flags
from deltaw.cli.pages import CONTEXT, EPILOG, Page, page
from deltaw.cli.train import train_flags
from deltaw.core.errors import InputError
from deltaw.federated.config import FederationConfig, make_federation_config
from deltaw.train.config import read_yaml

COMMANDS = {
    "credentials": "Make certificates and keys for the server and the nodes, and say what goes to whom.",
    "superlink": "Run the server that nodes connect to, until it is stopped.",
    "supernode": "Run one organisation's node, beside its rows, until it is stopped.",
    "start": "Start a federation over a running superlink, and wait for its end.",
    "ledger": "Show what an organisation's privacy ledger says was spent.",
}
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
_NOT_HERE = ("data", "eval_data", "held_out", "epochs", "max_steps", "adapter", "sharding", "early_stopping")
_NOT_HERE += ("save_every", "keep_checkpoints", "log_every", "eval_every", "metric", "tensorboard", "evaluate_before")


class _Federate(TyperGroup):
    """Lists its commands on its page."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(page(self, ctx, COMMANDS))


def _flags() -> list[Flag]:
    own = flags_of(
        FederationConfig, lambda name: _PANEL_OF.get(name, "Privacy of updates"), leave_out=("clients", "train")
    )
    return [*own, *(flag for flag in train_flags() if flag.name not in _NOT_HERE)]


FLAGS = _flags()
app = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=CONTEXT, cls=_Federate)


def federate(
    ctx: typer.Context,
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="a YAML file of these keys; flags win.", show_default=False)
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
        typer.Option(metavar="RUN", help="go on with a federation from its last whole round.", show_default=False),
    ] = None,
    example: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="run an example that comes with its rows: fraud or credit.", show_default=False
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print the run's record as one JSON object.")] = False,
    **given: Any,
) -> None:
    """Train one adapter among several organisations that do not show each other their rows.

    deltaw federate --config banks.yaml
    deltaw federate --client a=a.jsonl --client b=b.jsonl --client c=c.jsonl --test-data shared.jsonl --output runs/fed
    deltaw federate --example fraud

    Everything runs on this machine, as in a rehearsal; the commands below run the same over a network. docs/federation.md
    says what protects whom from what.
    """
    if ctx.invoked_subcommand is not None:
        return
    values = given_values(FLAGS, given)
    command = shlex.join(["deltaw", *ctx.obj])
    if example is not None:
        _example(example, config, values, command, json)
        return
    if resume is not None and (values or config is not None or client):
        raise InputError("--resume goes on with the federation's own configuration: leave the rest out")
    from deltaw.studies.catalogue import fetch_model
    from deltaw.studies.federate import resume_federation, run_federation

    with Say() as say:
        if resume is not None:
            run = resume_federation(resume, say=say)
        else:
            made = configuration(config, values, client or [])
            fetch_model(made.train.model, progress=say.bytes)
            run = run_federation(made, command=command, say=say)
    if json:
        print_json(run.record)
    else:
        show(run.record, run.path)


def configuration(file: str | None, values: dict[str, Any], clients: list[str]) -> FederationConfig:
    """The federation that a file and flags say; files of rows are looked for beside the YAML file.

    Raises:
        InputError: nothing that says who takes part, or keys that contradict each other.
    """
    keys: dict[str, Any] = {}
    if file is not None:
        keys = read_yaml(file)
        root = Path(file).parent
        if isinstance(keys.get("clients"), dict):
            keys["clients"] = {
                name: {key: _beside(root, value) for key, value in (own or {}).items()}
                if isinstance(own, dict)
                else own
                for name, own in keys["clients"].items()
            }
        if isinstance(keys.get("test_data"), str):
            keys["test_data"] = _beside(root, keys["test_data"])
    if clients:
        keys["clients"] = {}
        for entry in clients:
            name, equals, path = entry.partition("=")
            if not equals or not name or not path:
                raise InputError(f"--client is {entry!r}: expected NAME=FILE")
            if name in keys["clients"]:
                raise InputError(f"--client names {name!r} twice: give each organisation once")
            keys["clients"][name] = {"data": path}
    if "clients" not in keys:
        raise InputError("nobody takes part: give --config banks.yaml, or --client NAME=FILE for each organisation")
    keys |= values
    keys.setdefault("output", "")
    made = make_federation_config(keys)
    return made if made.train.output else make_federation_config({**keys, "output": str(_free())})


def _beside(root: Path, value: Any) -> Any:
    if not isinstance(value, str) or Path(value).exists():
        return value
    return str(root / value) if (root / value).exists() else value


def _free() -> Path:
    count = 1
    while (path := Path("runs") / f"federation-{count}").exists():
        count += 1
    return path


def _example(name: str, config: str | None, values: dict[str, Any], command: str, json: bool) -> None:
    from deltaw.studies.consortium import run_example

    if config is not None:
        raise InputError("--example brings its own configuration: leave --config out")
    with Say() as say:
        results = run_example(name, values, command=command, say=say, progress=say.bytes)
    if json:
        print_json(results)
        return
    from deltaw.studies.consortium import tables

    for title, table in tables(results):
        print_table(title, table)
    print_facts([("Numbers", results["numbers"]), ("Report", results["report"])])


def show(record: dict[str, Any], folder: Path) -> None:
    """What a federation came to, on stdout."""
    metrics = record.get("metrics", {})
    rows = [["", "before", "after"]]
    named = [("shared test rows", metrics), *((name, own) for name, own in metrics.get("silos", {}).items())]
    for name, own in named:
        for key in ("macro_auroc", "accuracy", "macro_f1", "f1", "loss"):
            if key in own.get("after", {}):
                before = own.get("before", {}).get(key)
                rows.append([f"{name}: {key}", "" if before is None else f"{before:.4f}", f"{own['after'][key]:.4f}"])
    print_table("Quality", rows)
    cost, told = record.get("cost", {}), record.get("federation", {})
    facts = [
        ("Rule", f"{told.get('rule')}, {told.get('rounds')} rounds, {len(told.get('clients', {}))} organisations"),
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

    deltaw federate credentials --folder keys --server fed.example.org --nodes bank-a,bank-b,bank-c
    deltaw federate credentials --folder keys/bank-a --own bank-a
    """
    from deltaw.federated.flower.credentials import make_credentials, make_node_credentials, table

    if (own is None) == (nodes is None):
        raise InputError("give --nodes (for all parties) or --own NAME (for one organisation)")
    if own is not None:
        made = make_node_credentials(folder, name=own)
    else:
        names = [part.strip() for part in (nodes or "").split(",") if part.strip()]
        made = make_credentials(folder, server_names=server or [], nodes=names, days=days)
    print_table("What goes to whom", table(made))


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
    silo = dict(keys.pop("silo"))
    if "config" not in silo or set(silo) - {"config"}:
        raise InputError(f"silo in {config} is {silo!r}: expected silo: {{config: FILE}}, the organisation's own file")
    file = Path(config).parent / silo["config"] if not Path(silo["config"]).exists() else Path(silo["config"])
    factory = node_factory(config=file, credentials=keys["credentials"], state=keys["state"])
    with Say() as say:
        run_supernode(**keys, client=factory, server=SERVER, say=say)


@app.command(name="start", epilog=EPILOG, cls=Page)
def start(
    ctx: typer.Context,
    config: Annotated[str, typer.Option(metavar="FILE", help="the federation's YAML file.")],
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="of the running superlink.")],
    credentials: Annotated[str, typer.Option(metavar="FOLDER", help="the server's folder of credentials.")],
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in output from its last round.")] = False,
) -> None:
    """Start a federation over a running superlink, and wait for its end.

    deltaw federate start --config banks.yaml --superlink fed.example.org:9092 --credentials keys/server
    """
    from deltaw.federated.flower.launch import start_run
    from deltaw.studies.deployment import SERVER, server_options

    made = configuration(config, {}, [])
    if not made.train.test_data:
        raise InputError("a federation over a network needs test_data at the server: rows that show the task")
    command = shlex.join(["deltaw", *ctx.obj])
    options = server_options(made, credentials=credentials, command=command, resuming=resume)
    with Say() as say:
        start_run(superlink=superlink, credentials=credentials, server=SERVER, options=options, say=say)


@app.command(name="ledger", epilog=EPILOG, cls=Page)
def ledger(
    file: Annotated[str, typer.Argument(metavar="FILE", help="a ledger, as a run's key ledger names it.")],
    json: Annotated[bool, typer.Option("--json", help="print it as one JSON object.")] = False,
) -> None:
    """Show what an organisation's privacy ledger says was spent.

    deltaw federate ledger bank-a.jsonl
    """
    from deltaw.privacy.ledger import Ledger

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
