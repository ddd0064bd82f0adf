"""`deltaw models`: what can be adapted, and where."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from deltaw.cli.console import Say, print_json, print_table
from deltaw.cli.pages import EPILOG, Page, new_app
from deltaw.core.errors import InputError

app = new_app()


@app.command(name="models", epilog=EPILOG, cls=Page)
def models(
    sites: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="show which modules of this model (an embedded name, a folder, a .gguf file, a hub id) "
            "targets would adapt.",
            show_default=False,
        ),
    ] = None,
    r: Annotated[
        int, typer.Option("--r", metavar="N", min=1, help="rank for which LoRA parameters are counted [default: 16]")
    ] = 16,
    target_modules: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A,B,...",
            help="further targets to show beside the groups: names, regular expressions",
            show_default=False,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="the task that the model would be loaded for; by default language modelling",
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print one JSON object.")] = False,
) -> None:
    """List the models that come with deltaw and the known architectures, or the modules that targets would adapt."""
    from deltaw.cli.options import split_commas

    targets = [part for text in target_modules or () for part in split_commas(text)]
    if sites is not None:
        _sites(sites, r, targets, task, json)
        return
    if targets or task is not None:
        raise InputError("--target-modules and --task need a model: give one with --sites")
    from deltaw.studies import catalogue

    found, known = catalogue.embedded_models(), catalogue.families()
    if json:
        print_json(
            {
                "embedded": [asdict(model) for model in found],
                "families": {name: {k: list(v) for k, v in table.items()} for names, table in known for name in names},
            }
        )
        return
    from deltaw.report.tables import format_bytes

    table = [["Model", "Download", "From PyPI", "Cached", "What it is"]]
    for model in found:
        table.append(
            [
                "\n".join(model.names),
                format_bytes(model.download_bytes),
                model.package,
                "yes" if model.cached else "no",
                model.about,
            ]
        )
    print_table("Models that need no account: fetched and checked when first used", table)
    rows = [["Architecture", "Attention", "MLP"]]
    for names, suffixes in known:
        rows.append([", ".join(names), *(_roles(suffixes, roles) for roles in (_attention(), _mlp()))])
    print_table("Known architectures, and the modules that play each role; others are inspected", rows)


def _attention() -> tuple[str, ...]:
    from deltaw.models.families import ATTENTION

    return ATTENTION


def _mlp() -> tuple[str, ...]:
    from deltaw.models.families import MLP

    return MLP


def _roles(suffixes: dict[str, tuple[str, ...]], wanted: tuple[str, ...]) -> str:
    lines = [f"{'+'.join(roles)}: {suffix}" for suffix, roles in suffixes.items() if set(roles) & set(wanted)]
    return "\n".join(lines)


def _sites(model: str, r: int, targets: list[str], task: str | None, json: bool) -> None:
    from deltaw.studies.catalogue import fetch_model, target_sites

    with Say() as say:
        fetch_model(model, progress=say.bytes)
        found = target_sites(model, r=r, targets=targets, task=task)
    names = list(dict.fromkeys(group for site in found for group in site.groups))
    totals = {
        group: {
            "sites": sum(group in site.groups for site in found),
            "parameters": sum(site.parameters for site in found if group in site.groups),
        }
        for group in names
    }
    if json:
        print_json({"model": model, "r": r, "groups": totals, "sites": [site.record() for site in found]})
        return
    print_table(
        f"Modules of {model} that targets adapt, and the parameters of a LoRA of r {r} on each", _site_table(found)
    )
    rows = [["Target", "Sites", "LoRA parameters"]]
    rows += [[name, f"{total['sites']:,}", f"{total['parameters']:,}"] for name, total in totals.items()]
    print_table("Together", rows)


def _site_table(found: list[Any]) -> list[list[str]]:
    """One row a kind of projection: its layers, role, shape, a LoRA's parameters on one, the targets that adapt it."""
    from deltaw.report.tables import ranges, split_name, without_empty_columns

    kinds: dict[tuple[str, ...], list[Any]] = {}
    for site in found:
        prefix, _, suffix = split_name(site.name)
        shape = " × ".join(f"{size:,}" for size in site.shape)
        kind = "–" if site.kind == "linear" else site.kind
        key = (prefix, suffix, ", ".join(site.roles), kind, shape, ", ".join(site.groups))
        kinds.setdefault(key, []).append(site)
    suffixes = [suffix for _, suffix, *_ in kinds]
    table = [["Module", "Layers", "Role", "Kind", "Out × in", "Parameters", "Targets"]]
    for (prefix, suffix, role, kind, shape, targets), members in kinds.items():
        layers = [layer for site in members if (layer := split_name(site.name)[1]) is not None]
        name = f"{prefix}.*.{suffix}" if suffixes.count(suffix) > 1 and layers else suffix
        table.append([name, ranges(layers) or "–", role or "–", kind, shape, f"{members[0].parameters:,}", targets])
    return without_empty_columns(table)
