"""The picture of the ranks: only where they differ, one cell a site, words for those who cannot see it."""

from __future__ import annotations

import re
import xml.etree.ElementTree as tree

from made_runs import HOSTILE, made_run, made_sites

from deltaw.report import write_report
from deltaw.report.folder import RunFolder
from deltaw.report.page import page, ranks_section
from deltaw.report.ranks import ranks_caption, ranks_figures


def run_with(sites):
    run = made_run()
    run["method"] |= {"name": "adalora", "config": {"init_r": 12, "target_r": 8, "alpha": 24.0}, "sites": sites}
    return run


def varied():
    return [site | {"r": number * 7 % 13, "init_r": 12} for number, site in enumerate(made_sites())]


def cells(figure):
    """{what a tooltip says: what stands in the cell}, and the share of the darkest colour of each."""
    found, shades = {}, {}
    for group in tree.fromstring(figure).iter("g"):
        said = group.find("title").text
        found[said] = group.find("text").text
        shades[said] = int(re.search(r"(\d+)%", group.find("rect").get("style"))[1])
    return found, shades


def test_every_site_has_its_cell():
    sites = varied()
    (figure,) = ranks_figures(run_with(sites))
    found, shades = cells(figure)
    assert len(found) == len(sites) == 210
    for site in sites:
        layer, kind = re.match(r"model\.layers\.(\d+)\.(.*)", site["name"]).groups()
        said = f"layer {layer}, {kind}: rank {site['r']}"
        assert found[said] == str(site["r"]) and shades[said] == round(100 * site["r"] / 12)
    words = [text.text for text in tree.fromstring(figure).iter("text")]
    assert {"q_proj", "gate_proj", "layer", "rank", "0", "3", "6", "9", "12", "29"} <= set(words)
    said = tree.fromstring(figure).find("svg").get("aria-label")
    assert said.startswith("Heat map of the rank at every site: self_attn.q_proj ") and "mlp.down_proj" in said
    assert tree.fromstring(figure).find("svg").get("role") == "img"


def test_cells_do_not_overlap_and_lie_inside_the_drawing():
    (figure,) = ranks_figures(run_with(varied()))
    drawing = tree.fromstring(figure).find("svg")
    _, _, width, height = map(float, drawing.get("viewBox").split())
    boxes = [[float(box.get(key)) for key in ("x", "y", "width", "height")] for box in drawing.iter("rect")]
    assert all(0 <= x and x + w <= width and 0 <= y and y + h <= height for x, y, w, h in boxes)
    assert len({(x, y) for x, y, _, _ in boxes}) == len(boxes) == 210 + 5


def test_words():
    sites = [
        {"name": "h.0.attn.c_attn", "r": 2, "init_r": 4},
        {"name": "h.0.mlp.c_fc", "r": 0, "init_r": 4},
        {"name": "h.1.attn.c_attn", "r": 4, "init_r": 4},
        {"name": "h.1.mlp.c_fc", "r": 4, "init_r": 4},
    ]
    said = ranks_caption(run_with(sites))
    assert said == (
        "10 ranks of the 16 at first over 4 sites, 2.5 on average; the lowest 0 at h.0.mlp.c_fc, the highest 4 at "
        "2 sites."
    )
    assert said in ranks_section(run_with(sites))


def test_only_where_ranks_differ():
    assert ranks_figures(made_run()) == [] and ranks_section(made_run()) is None
    assert "Rank of every layer" not in page_of(made_run())
    assert ranks_section({}) is None and ranks_section(run_with([{"name": "a"}, {"name": "b", "r": "x"}])) is None
    shown = page_of(run_with(varied()))
    assert "Rank of every layer" in shown and "AdaLoRA, init_r 12, target_r 8, alpha 24" in shown
    # A LoRA with a rank_pattern has something to show too.
    run = made_run()
    run["method"]["sites"][3]["r"] = 2
    assert ranks_figures(run) and "at first" not in ranks_caption(run)


def page_of(run):
    return page(RunFolder(run))


def test_stacks_experts_and_sites_outside_the_layers():
    names = ["encoder.block.0.q", "encoder.block.1.q", "decoder.block.0.q", "decoder.block.0.cross.q", "lm_head"]
    names += [f"decoder.block.0.experts.{number}.up" for number in range(3)]
    sites = [{"name": name, "r": number} for number, name in enumerate(names)]
    first, second, third = ranks_figures(run_with(sites))
    titles = [tree.fromstring(figure).find("h3").text for figure in (first, second, third)]
    assert titles == ["encoder.block", "decoder.block", "outside the layers"]
    assert cells(first)[0] == {"layer 0, q: rank 0": "0", "layer 1, q: rank 1": "1"}
    assert cells(second)[0]["layer 0, experts.*.up: rank 5–7"] == "5–7"
    assert cells(third)[0] == {"lm_head: rank 4": "4"}


def test_hostile_names_stay_text(make_folder):
    sites = [{"name": f"a.{number}.{text}", "r": number} for number, text in enumerate(HOSTILE)]
    figures = ranks_figures(run_with(sites))
    assert figures and all(tree.fromstring(figure) is not None for figure in figures)
    shown = write_report(make_folder(run_with(sites))).read_text(encoding="utf-8")
    assert "<script" not in shown and "<img" not in shown and "onload='" not in shown
