from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_runs import HOSTILE, made_examples, made_metrics

from deltaw.core.errors import InputError
from deltaw.report import metrics_table, write_report

VOID = {"meta", "link", "br", "col"}
MakeFolder = Callable[..., Path]


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len({name for name, _ in attrs}) == len(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[str]:
        return [text for inside, text in self.texts if inside == tag]

    @property
    def text(self) -> str:
        return " ".join(text for inside, text in self.texts if inside != "style")


def read(folder: Path) -> Page:
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def sections(page: Page) -> list[str]:
    return [str(values["id"]) for tag, values in page.tags if tag == "h2" and "id" in values]


def test_a_finished_run_has_every_part_in_order(full_folder: Path) -> None:
    page = read(full_folder)
    order = ["result", "curves", "metrics", "confusion", "sites", "cost", "data", "examples", "setup", "reproduce"]
    assert sections(page) == order
    assert page.all("h1") == [] and "SmolLM2-135M-Instruct" in page.all("bdi")
    assert "SmolLM2-135M-Instruct: LoRA, r 8, alpha 16 · ΔW run report" in page.all("title")
    for row in metrics_table(json.loads((full_folder / "run.json").read_text())):
        assert all(cell in page.text for cell in row)
    for shown in ("2.44 M", "1.78 % of 137 M", "2 min 21 s", "426", "2.06 GiB", "9.35 MiB", "22 November 2026"):
        assert shown in page.text
    assert "12.5 points better than the best baseline (TF-IDF + logistic regression)" in page.text
    assert page.text.count("✓ right") == 3 + 8 and page.text.count("✗ wrong") == 7 + 2
    assert "deltaw train --config runs/reviews/config.yaml --output runs/reviews-again" in page.all("code")
    assert "deltaw train --config reviews.yaml --output runs/reviews" in page.all("code")
    assert len([1 for tag, _ in page.tags if tag == "svg"]) == 2


def test_the_page_is_one_file_that_fetches_and_runs_nothing(full_folder: Path) -> None:
    page = read(full_folder)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "object", "embed", "form", "base"}
    for _, values in page.tags:
        assert not [name for name in values if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action"):
            assert str(values.get(name) or "#").startswith(("#", "data:,"))
    style = next(text for inside, text in page.texts if inside == "style")
    assert "url(" not in style and "@import" not in style and "http" not in style
    policy = next(values["content"] for _, values in page.tags if values.get("http-equiv"))
    assert str(policy).startswith("default-src 'none'") and "script-src" not in str(policy)
    assert "prefers-color-scheme: dark" in style and "@media print" in style


def test_tables_charts_and_headings_can_be_read_aloud(full_folder: Path) -> None:
    page = read(full_folder)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("table") == tags.count("caption")
    assert tags.count("h1") == 1
    assert all(values.get("scope") for tag, values in page.tags if tag == "th")
    assert all(values.get("aria-label") for tag, values in page.tags if tag == "svg")
    assert all(values.get("tabindex") == "0" for _, values in page.tags if values.get("class") == "scroll")
    ids = [values["id"] for _, values in page.tags if "id" in values]
    assert len(ids) == len(set(ids))
    links = [str(values["href"])[1:] for tag, values in page.tags if tag == "a"]
    assert links == sections(page)


def test_confusion_has_counts_and_shades(full_folder: Path) -> None:
    text = write_report(full_folder).read_text()
    cells = re.findall(r'<td class="cell( hit)?" style="--a:([\d.]+)" title="([^"]*)">(\d+)</td>', text)
    assert [int(cell[3]) for cell in cells] == [40, 5, 16, 22, 6, 22, 27, 5, 57, 51, 6, 4, 7, 36, 7, 2, 8, 79]
    assert [bool(cell[0]) for cell in cells] == [i % 4 == 0 for i in range(9)] * 2
    assert float(cells[1][1]) == pytest.approx(5 / 61, abs=1e-3)
    assert cells[1][2] == "true negative, predicted neutral: 5 (8.20 % of the row)"


def test_many_labels_become_a_list_of_confusions(run: dict[str, Any], make_folder: MakeFolder) -> None:
    labels = [f"intent {i}" for i in range(30)]
    after = [[9 if i == j else 0 for j in range(30)] for i in range(30)]
    after[3][4], after[7][1] = 2, 5
    run["metrics"] |= {"labels": labels, "confusion": {"after": after}}
    page = read(make_folder(run))
    assert "The most frequent confusions of 30 labels" in page.text
    assert page.text.index("intent 7") < page.text.index("intent 3")
    assert "cell" not in {values.get("class") for _, values in page.tags}


@pytest.mark.parametrize("wrong", [None, [], [[1, 2]], [[1, 2], [3]], "x", [[1, 2], [3, 4]]])
def test_a_malformed_matrix_is_left_out(run: dict[str, Any], make_folder: MakeFolder, wrong: Any) -> None:
    run["metrics"]["confusion"] = {"after": wrong}
    assert "confusion" not in sections(read(make_folder(run)))


def test_a_failed_run_says_so_first(run: dict[str, Any], make_folder: MakeFolder) -> None:
    run |= {
        "status": "failed",
        "error": "the loss is NaN at step 31: lower the learning rate",
        "metrics": {},
        "cost": {},
    }
    lines = [*made_metrics()[:30], {"step": 31, "loss": math.nan}]
    page = read(make_folder(run, metrics=lines))
    assert (
        page.text.index("This run failed") < page.text.index("the loss is NaN at step 31") < page.text.index("Result")
    )
    assert "The last logged step is 31." in page.text
    assert "nan" not in page.text.lower().replace("nan at", "")


def test_a_running_run_says_so(run: dict[str, Any], make_folder: MakeFolder) -> None:
    run["status"] = "running"
    page = read(make_folder(run))
    assert "This run has not finished" in page.text and "No step was logged." in page.text


def test_a_run_below_its_baseline_says_so(run: dict[str, Any], make_folder: MakeFolder) -> None:
    run["metrics"]["after"]["accuracy"] = 0.65
    assert "5.5 points worse than the best baseline (TF-IDF + logistic regression)" in read(make_folder(run)).text


def test_a_perplexity_run_marks_no_answers(run: dict[str, Any], make_folder: MakeFolder) -> None:
    run |= {"task": "causal-lm", "metrics": {"before": {"perplexity": 24.5}, "after": {"perplexity": 18.2}}}
    page = read(make_folder(run, examples=made_examples()))
    assert "confusion" not in sections(page) and "examples" in sections(page)
    assert "✓" not in page.text and "✗" not in page.text
    assert "Perplexity, before and after training" in page.text and "baseline" not in page.text


def test_an_entity_run(run: dict[str, Any], make_folder: MakeFolder) -> None:
    run |= {"task": "token-classification", "metrics": {"before": {"f1": 0.02}, "after": {"f1": 0.61}}}
    page = read(make_folder(run))
    assert "Entity F1, before and after training" in page.text and "confusion" not in sections(page)


def test_full_fine_tuning_has_no_sites(run: dict[str, Any], make_folder: MakeFolder) -> None:
    run["method"] = {"name": "full", "config": {}, "trainable_parameters": 10, "total_parameters": 10, "share": 1.0}
    page = read(make_folder(run))
    assert "sites" not in sections(page) and "Full fine-tuning" in page.text


def test_next_to_nothing_is_still_a_page(make_folder: MakeFolder) -> None:
    page = read(make_folder({}, config=None))
    assert sections(page) == [] and "unnamed model" in page.text


@pytest.mark.parametrize("wrong", [None, 3, "text", [], [1], {"x": None}, math.nan])
def test_wrong_types_are_left_out(run: dict[str, Any], make_folder: MakeFolder, wrong: Any) -> None:
    for key in list(run):
        if key != "format":
            read(make_folder({**run, key: wrong}, metrics=made_metrics(), name=f"run-{key}"))
    read(make_folder({key: wrong for key in run if key != "format"}, examples=[{"prompt": wrong}], name="all"))


def test_half_a_line_is_left_out_and_said(full_folder: Path) -> None:
    with open(full_folder / "metrics.jsonl", "ab") as file:
        file.write(b'[1]\n{"step": 51, "lo\xff')
    assert "metrics.jsonl: 2 unreadable lines left out." in read(full_folder).text


def test_a_resumed_run_draws_each_step_once(run: dict[str, Any], make_folder: MakeFolder) -> None:
    lines = made_metrics()
    plain = write_report(make_folder(run, metrics=lines, name="plain")).read_text()
    twice = write_report(make_folder(run, metrics=lines[:30] + lines[20:], name="twice")).read_text()
    assert re.findall("<svg.*?</svg>", plain) == re.findall("<svg.*?</svg>", twice)


def test_hostile_text_stays_text(hostile_folder: Path) -> None:
    page = read(hostile_folder)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "i", "u", "iframe"}
    assert all(not name.startswith("on") for _, values in page.tags for name in values)
    for text in HOSTILE[:5]:
        assert text in page.text
    raw = (hostile_folder / "report.html").read_bytes().decode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", raw)
    assert "more characters)" in page.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no run.json in"),
        ("", "is not valid JSON"),
        ('{"format": 1,', "is not valid JSON"),
        ("\udcff", "is not valid JSON"),
        ("[1]", "holds a list, expected a JSON object"),
        ('{"format": 2}', "has format 2, expected 1"),
        ("[" * 200_000, "is not valid JSON"),
    ],
)
def test_a_wrong_run_json_is_one_line(full_folder: Path, content: str | None, message: str) -> None:
    before = write_report(full_folder).read_bytes()
    if content is None:
        (full_folder / "run.json").unlink()
    else:
        (full_folder / "run.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        write_report(full_folder)
    assert "\n" not in str(caught.value)
    assert (full_folder / "report.html").read_bytes() == before


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run folder at"):
        write_report(tmp_path / "none")


def test_the_same_folder_gives_the_same_bytes_and_nothing_else(full_folder: Path) -> None:
    files = {path.name for path in full_folder.iterdir()}
    first = write_report(full_folder).read_bytes()
    assert write_report(str(full_folder)).read_bytes() == first
    assert {path.name for path in full_folder.iterdir()} == files | {"report.html"}
    assert len(first) < 200_000


PROBE = """<script>
const seen = [];
addEventListener("error", e => seen.push(e.message));
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(d => d.open = true);
  const root = document.documentElement;
  const outside = [...document.body.querySelectorAll("*")].filter(e => !e.closest(".scroll, pre, svg")
    && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + "." + e.className);
  const bare = e => parseFloat(getComputedStyle(e).fontSize);
  parent.postMessage(JSON.stringify({width: innerWidth, scroll: root.scrollWidth, outside, errors: seen,
    alerted: window.alerted || 0, smallest: Math.min(...[...document.querySelectorAll("p, td, th, dt, dd")].map(bare))
  }), "*");
});
window.alert = () => { window.alerted = 1; };
</script>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("kind", ["full_folder", "hostile_folder"])
def test_nothing_overflows_in_a_browser(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    text = write_report(request.getfixturevalue(kind)).read_text(encoding="utf-8")
    # The page's own policy forbids the probe's script, and a window cannot be as narrow as a frame.
    probed = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', PROBE, text, count=1)
    (tmp_path / "page.html").write_text(probed, encoding="utf-8")
    frames = "".join(
        f'<iframe src="page.html" style="width:{w}px;height:900px;border:0"></iframe>' for w in (390, 1280)
    )
    outer = (
        "<body><script>addEventListener('message', e => { const p = document.createElement('pre');"
        f"p.textContent = e.data; document.body.append(p); }});</script>{frames}"
    )
    (tmp_path / "outer.html").write_text(outer)
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run --disable-sync"
    flags += " --disable-component-update --disable-dev-shm-usage --virtual-time-budget=5000 --window-size=1400,1000"
    done = subprocess.run(
        [
            "chromium",
            *flags.split(),
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            str(tmp_path / "outer.html"),
        ],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, "HOME": str(tmp_path)},
        check=True,
    )
    found = [json.loads(line.replace("&gt;", ">")) for line in re.findall("<pre>(.*?)</pre>", done.stdout)]
    assert sorted(view["width"] for view in found) == [390, 1280], done.stderr[-2000:]
    for view in found:
        assert view["scroll"] <= view["width"] and view["outside"] == []
        assert view["errors"] == [] and view["alerted"] == 0
        assert view["smallest"] >= 12


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1])
def test_text_has_contrast_in_both_themes(theme: int) -> None:
    from deltaw.report.style import CSS

    blocks = [
        dict(re.findall(r"--(\w[\w-]*): (#[0-9a-f]{6});", block)) for block in re.findall(r":root \{(.*?)\}", CSS, re.S)
    ]
    colours = blocks[theme]
    pairs = [(ink, paper) for ink in ("ink", "muted", "accent", "good", "bad") for paper in ("bg", "surface")]
    pairs += [("ink", "soft"), ("ink", "shade"), ("bad", "bad-soft"), ("warn", "warn-soft"), ("ink", "bad-soft")]
    for ink, paper in pairs:
        high, low = sorted((luminance(colours[ink]), luminance(colours[paper])), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, paper)
