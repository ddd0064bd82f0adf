"""`deltaw shrink`: an adapter of lower rank, and advice on which."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from deltaw.cli.console import Say, print_facts, print_json, print_table
from deltaw.cli.pages import EPILOG, Page, new_app
from deltaw.core.errors import InputError

app = new_app()

#: Sites up to which each has a line of its own; more are gathered by layer.
_EACH = 40


@app.command(name="shrink", epilog=EPILOG, cls=Page)
def shrink(
    adapter: Annotated[
        str | None, typer.Argument(metavar="ADAPTER", help="a run folder, or an adapter's.", show_default=False)
    ] = None,
    output: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="the folder to write: new, or empty.", show_default=False)
    ] = None,
    r: Annotated[
        str | None, typer.Option("--r", metavar="N", help="the highest rank to keep.", show_default=False)
    ] = None,
    energy: Annotated[
        str | None,
        typer.Option(
            metavar="X",
            help="instead, the share of each update's sum of squares to keep; with --advise 0.99 by default.",
            show_default=False,
        ),
    ] = None,
    rank_pattern: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="name or regular expression = highest rank, for modules whose rank differs; several between commas.",
            show_default=False,
        ),
    ] = None,
    advise: Annotated[
        bool, typer.Option("--advise", help="write nothing: say which rank the adapter needs, or guides advise.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="measure before and after on the run's held-out rows.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="with --advise alone, the model to train; with --measure, where the run's base is now.",
            show_default=False,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="with --advise alone: light, instruct or reasoning.", show_default=False),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="auto, cpu or cuda, with --measure; by default the run's.", show_default=False
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print one JSON object, with every site.")] = False,
) -> None:
    """Cut an adapter to a lower rank, the nearest update there is, and say how near; or say which rank to take.

    deltaw shrink runs/x --r 4 --output small
    deltaw shrink runs/x --energy 0.99 --output small
    deltaw shrink runs/x --r 8 --rank-pattern q_proj=2,k_proj=2 --output small
    deltaw shrink runs/x --advise
    deltaw shrink --advise --model smollm2-135m --task light

    Needs no base, except to measure. The folder is in PEFT's layout, with ranks by site where they differ.
    """
    from deltaw.cli.options import pairs, typed_number

    rank = None if r is None else typed_number("--r", r, "int")
    share = None if energy is None else float(typed_number("--energy", energy, "float"))
    patterns = None if rank_pattern is None else pairs("--rank-pattern", rank_pattern, int)
    assert rank is None or isinstance(rank, int)
    given: dict[str, Any] = {"--output": output, "--r": r, "--rank-pattern": rank_pattern, "--device": device}
    given["--measure"] = measure or None
    if advise:
        _refuse(given, "--advise writes and measures nothing")
        if adapter is None:
            _refuse({"--energy": energy}, "there is no adapter to look at")
            _advise_model(model, task, json)
            return
        _refuse({"--model": model, "--task": task}, "the adapter itself is looked at")
        from deltaw.studies.shrinking import rank_advice

        found = rank_advice(adapter, **({} if share is None else {"energy": share}))
        print_json(found) if json else _show_advice(found)
        return
    if adapter is None:
        raise InputError("nothing to shrink: give a run folder or an adapter's; or --advise for advice on ranks")
    if output is None:
        raise InputError("no output: name the folder to write with --output")
    _refuse({"--task": task}, "it goes with --advise")
    changes = {name: value for name, value in (("model", model), ("device", device)) if value is not None}
    if not measure:
        _refuse({f"--{name}": value for name, value in changes.items()}, "nothing is measured without --measure")
    from deltaw.studies.shrinking import shrink_adapter

    with Say() as say:
        done = shrink_adapter(
            adapter,
            output,
            r=rank,
            energy=share,
            rank_pattern=patterns,
            measure=measure,
            changes=changes,
            say=say,
        )
    print_json(done) if json else _show(done)


def _refuse(flags: Mapping[str, Any], why: str) -> None:
    given = [name for name, value in flags.items() if value is not None]
    if given:
        raise InputError(f"{why}: leave out {', '.join(given)}")


def by_layer(sites: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Sites one by one where they are few, else gathered by the layer that their path names first."""
    if len(sites) <= _EACH:
        return {path: [site] for path, site in sites.items()}
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for path in sorted(sites, key=lambda path: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", path)]):
        layer = re.match(r".*?\.\d+(?=\.)", path)
        groups.setdefault(layer[0] if layer else path, []).append(sites[path])
    return groups


def spread(values: Sequence[int]) -> str:
    """Equal whole numbers as one, others as lowest to highest."""
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)}-{max(values)}"


def show_errors(title: str, sites: Mapping[str, Mapping[str, Any]]) -> None:
    """Ranks before and after and relative errors, by site or by layer."""
    groups = by_layer(sites)
    single = len(groups) == len(sites)
    head = ["Site", "r before", "r", "Error"] if single else ["Layer", "r before", "r", "Median error", "Worst error"]
    rows = []
    for name, group in groups.items():
        errors = [site["relative_error"] for site in group]
        shown = errors if single else [statistics.median(errors), max(errors)]
        ranks = [spread([site[key] for site in group]) for key in ("r_before", "r")]
        rows.append([name, *ranks, *(error_text(error) for error in shown)])
    print_table(title, [head, *rows])


def error_text(error: float) -> str:
    """A relative error; what float32 rounds is no error."""
    return "0" if error == 0 else f"{error:.4f}" if error >= 5e-5 else f"{error:.0e}"


def _show(done: Mapping[str, Any]) -> None:
    from deltaw.report.tables import format_bytes

    show_errors("Relative Frobenius error of the update", done["sites"])
    if "metrics" in done:
        before, after = done["metrics"]["before"], done["metrics"]["after"]
        figures = [[name.replace("_", " "), f"{before[name]:.4g}", f"{after[name]:.4g}"] for name in before
                   if name in after]  # fmt: skip
        print_table("Held-out rows", [["Metric", "Before", "After"], *figures])
    print_facts(
        [
            ("Error in all", error_text(done["relative_error"])),
            ("Highest rank", f"{done['r']}, before {done['r_before']}"),
            ("Parameters", f"{done['parameters']:,}, before {done['parameters_before']:,}"),
            ("Size", f"{format_bytes(done['bytes'])}, before {format_bytes(done['bytes_before'])}"),
            ("Output", done["output"]),
        ]
    )


def _show_advice(found: Mapping[str, Any]) -> None:
    groups = by_layer(found["sites"])
    share = f"{found['energy']:.4g}"
    head = ["Layer", "r", "Effective rank", "Stable rank", "Energy at r/2", "Energy at r/4", f"r for {share}"]
    rows = []
    for name, group in groups.items():
        means = [statistics.fmean(site[key] for site in group) for key in ("effective_rank", "stable_rank")]
        kept = [min(site[key] for site in group) for key in ("energy_half", "energy_quarter")]
        ranks = [spread([int(site[key]) for site in group]) for key in ("r", "r_needed")]
        rows.append([name, ranks[0], *(f"{m:.2f}" for m in means), *(f"{k:.4f}" for k in kept), ranks[1]])
    note = "" if len(groups) == len(found["sites"]) else " (layers: mean ranks, lowest energies)"
    print_table(f"Singular values of the learnt updates{note}", [head, *rows])
    advice = f"{found['r_recommended']}, which keeps {found['energy_at_recommended']:.4f} of all updates' energy"
    if found["fills_rank"]:
        advice += f"; they fill all {found['r']} directions, so a higher rank may learn more"
    print_facts(
        [
            ("Rank now", str(found["r"])),
            ("Recommended", advice),
            ("Parameters", f"{found['parameters']:,}"),
            (f"at rank {found['r_recommended']}", f"{found['parameters_at_recommended']:,}"),
            (f"with --energy {share}", f"{found['parameters_by_site']:,}"),
        ]
    )


def _advise_model(model: str | None, task: str | None, as_json: bool) -> None:
    from deltaw.studies.shrinking import parameter_count, rank_heuristics

    parameters = None
    if model is not None:
        from deltaw.studies.catalogue import fetch_model

        with Say() as say:
            fetch_model(model, progress=say.bytes)
            parameters = parameter_count(model)
    rows = rank_heuristics(parameters=parameters, task=task)
    if as_json:
        facts = {"model": model, "parameters": parameters, "task": task}
        print_json({**{name: value for name, value in facts.items() if value is not None}, "advice": rows})
        return
    asked = model is not None or task is not None
    head = ["For", "Task", "r", *(["Fits"] if asked else [])]
    table = [
        [row["for"], row["task"], f"{row['r_low']}-{row['r_high']}", *(["yes" if row["fits"] else ""] if asked else [])]
        for row in rows
    ]
    print_table("Ranks that guides advise", [head, *table])
    if parameters is not None:
        print_facts([("Model", str(model)), ("Parameters", f"{parameters:,}")])
