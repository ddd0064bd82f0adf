"""`deltaw combine`: adding, subtracting and scaling adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from deltaw.cli.console import print_facts, print_json, print_table
from deltaw.cli.pages import EPILOG, Page, new_app
from deltaw.cli.shrink import error_text, show_errors
from deltaw.core.errors import InputError

app = new_app()

#: Sites shown, those of the largest errors.
_WORST = 5


@app.command(name="combine", epilog=EPILOG, cls=Page)
def combine(
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER[=WEIGHT]",
            help="an adapter (or a run folder) and its weight, 1 by default; again for several; below 0 subtracts",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="the folder to write: new, or empty.", show_default=False)
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="cat (exact: ranks add up), svd (the nearest of rank r), linear, ties, dare_linear, dare_ties, "
            "magnitude_prune (on A and B), or the last four with _svd (on the dense updates); by default cat, and svd "
            "where --r is given.",
            show_default=False,
        ),
    ] = None,
    r: Annotated[
        str | None,
        typer.Option(
            "--r", metavar="N", help="rank of svd and *_svd; by default the adapters' highest.", show_default=False
        ),
    ] = None,
    density: Annotated[
        str | None,
        typer.Option(
            metavar="X", help="share of entries to keep: for ties, dare_* and magnitude_*.", show_default=False
        ),
    ] = None,
    seed: Annotated[str, typer.Option(metavar="N", help="of the entries that dare_* drops. [default: 0]")] = "0",
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="the base to name in the folder; by default the adapters'.", show_default=False
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print one JSON object, with every site.")] = False,
) -> None:
    """Add, subtract and scale adapters: one plain LoRA adapter, and its error against the exact weighted sum.

    deltaw combine --adapter runs/x --adapter runs/y=0.5 --output sum
    deltaw combine --adapter runs/x --adapter runs/y=-1 --r 8 --output difference
    deltaw combine --adapter A --adapter B --method ties --density 0.2 --output C

    Needs no base. Ranks, scales and targets may differ; a module that an adapter lacks counts as zero there.
    """
    from deltaw.cli.options import adapter_weight, typed_number
    from deltaw.studies.combining import combine as combine_adapters

    if not adapter:
        raise InputError("nothing to combine: give adapters with --adapter FOLDER or --adapter FOLDER=WEIGHT")
    if output is None:
        raise InputError("no output: name the folder to write with --output")
    ranks, seeds = None if r is None else typed_number("--r", r, "int"), typed_number("--seed", seed, "int")
    assert (ranks is None or isinstance(ranks, int)) and isinstance(seeds, int)
    done = combine_adapters(
        [adapter_weight(text) for text in adapter],
        output,
        method=method,
        r=ranks,
        density=None if density is None else float(typed_number("--density", density, "float")),
        seed=seeds,
        model=model,
    )
    print_json(done) if json else _show(done)


def _show(done: Mapping[str, Any]) -> None:
    from deltaw.report.tables import format_bytes

    rows = [["Adapter", "Weight", "Modules", "Parameters", "Size"]]
    rows += [
        [a["path"], f"{a['weight']:g}", f"{a['sites']:,}", f"{a['parameters']:,}", format_bytes(a["bytes"])]
        for a in done["adapters"]
    ]
    print_table(f"Combined by {done['method']}", rows)
    worst = sorted(done["sites"].items(), key=lambda site: -site[1]["relative_error"])[:_WORST]
    show_errors(f"Against the exact sum, relative Frobenius error: the worst {len(worst)} sites", dict(worst))
    print_facts(
        [
            ("Error in all", error_text(done["relative_error"])),
            ("Highest rank", str(done["r"])),
            ("Parameters", f"{done['parameters']:,}"),
            ("Size", format_bytes(done["output_bytes"])),
            ("Output", done["output"]),
        ]
    )
