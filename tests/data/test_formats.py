"""Reading: every format gives back what was written, and every hostile input one line that says where."""

import csv
import hashlib
import json
import os
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.core.errors import InputError, RunError
from deltaw.data import ChatRow, LabelRow, PromptRow, TagRow, TextRow, read_rows

LABELLED = '{"text": "good", "label": "positive"}\n{"text": "bad", "label": "negative"}\n'

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
TAGGED = st.lists(st.tuples(TEXT, st.sampled_from(["O", "B-per", "I-per"])), min_size=1, max_size=5)
MESSAGES = st.tuples(TEXT, TEXT).map(
    lambda pair: [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
)
RECORDS = {
    "text": st.builds(lambda a: {"text": a}, TEXT),
    "prompt": st.builds(lambda a, b: {"prompt": a, "completion": b}, TEXT, TEXT),
    "label": st.builds(lambda a, b: {"text": a, "label": b.strip()}, TEXT, TEXT),
    "chat": st.builds(lambda m: {"messages": m}, MESSAGES),
    "tags": st.builds(lambda p: {"tokens": [w for w, _ in p], "tags": [t for _, t in p]}, TAGGED),
}
TYPES = {"text": TextRow, "prompt": PromptRow, "label": LabelRow, "chat": ChatRow, "tags": TagRow}


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def save(path, records):
    """Writes records with the usual libraries."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(records[0])
            for r in records:
                writer.writerow([v if isinstance(v, str) else json.dumps(v) for v in r.values()])


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("layout", list(RECORDS))
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_round_trip(layout, suffix, data, tmp_path_factory):
    records = data.draw(st.lists(RECORDS[layout], min_size=1, max_size=4))
    path = tmp_path_factory.mktemp("data") / f"rows{suffix}"
    save(path, records)
    got = read_rows(path)
    assert list(got.rows) == [TYPES[layout](**r) for r in records]
    assert got.layout == layout
    assert got.counts.rows == len(records)
    assert got.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def refusal(path, **options):
    """The one-line message of the error that reading raises."""
    with pytest.raises(InputError) as caught:
        read_rows(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path, "train.jsonl", LABELLED)
    message = refusal(tmp_path / "trian.jsonl")
    assert f"no such file: {tmp_path / 'trian.jsonl'}" in message
    assert f"did you mean {tmp_path / 'train.jsonl'}?" in message
    assert "does not exist either" in refusal(tmp_path / "nowhere" / "train.jsonl")


def test_folder_and_extension(tmp_path):
    assert "is a folder" in refusal(tmp_path)
    message = refusal(write(tmp_path, "train.txt", "hello"))
    assert "unknown extension '.txt'" in message and ".parquet" in message


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_empty_file(tmp_path, name):
    assert "is empty" in refusal(write(tmp_path, name, ""))


def test_files_with_nothing_in_them(tmp_path):
    assert "is empty" in refusal(write(tmp_path, "a.jsonl", "\n \n"))
    assert "is empty" in refusal(write(tmp_path, "a.csv", "text,label\n"))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    assert "is empty" in refusal(tmp_path / "a.parquet")
    path = write(tmp_path, "b.jsonl", '{"text": " "}\n{"text": ""}\n')
    assert refusal(path) == f"{path}: no row is left (0 bad, 2 empty): expected at least one"


BAD_LINES = {
    "no field": ('{"text": "x"}', "the row has no 'label'"),
    "null": ('{"text": "x", "label": null}', "'label' is null"),
    "wrong type": ('{"text": 5, "label": "a"}', "'text' is int 5: expected text"),
    "float label": ('{"text": "x", "label": 0.5}', "'label' is float 0.5"),
    "boolean label": ('{"text": "x", "label": true}', "'label' is bool True"),
    "blank label": ('{"text": "x", "label": " "}', "'label' is blank"),
    "encoding": (b'{"text": "caf\xe9", "label": "a"}', "not UTF-8: byte 0xe9 at byte 14 of the line"),
    "surrogate": ('{"text": "\\ud800", "label": "a"}', "the lone surrogate U+D800"),
    "broken JSON": ('{"text": "x", "label"', "malformed JSON at column 22"),
    "array": ("[1, 2]", "expected one JSON object a line, got list"),
    "deep": ("[" * 100000, "malformed JSON"),
    "long number": ('{"text": ' + "1" * 5000 + "}", "malformed JSON"),
}


@pytest.mark.parametrize("line,expected", BAD_LINES.values(), ids=BAD_LINES)
def test_bad_json_line(tmp_path, line, expected):
    raw = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path, "a.jsonl", LABELLED.encode() + b"\n" + raw + b"\n" + LABELLED.encode())
    message = refusal(path)
    assert message.startswith(f"{path}:4: ") and expected in message
    got = read_rows(path, skip_bad_rows=True)
    assert (got.counts.rows, got.counts.bad, got.counts.empty) == (4, 1, 0)
    assert list(got.lines) == [1, 2, 5, 6]
    assert got.where(2) == f"{path}:5"


BAD_CELLS = {
    "no message list": ({"messages": "hello"}, "'messages' is str 'hello': expected a list"),
    "message no object": ({"messages": ["hello"]}, "message 1 of 'messages' is str"),
    "no role": ({"messages": [{"content": "x"}]}, "message 1 of 'messages' has no 'role' text (its keys: ['content'])"),
    "no content": ({"messages": [{"role": "user", "content": None}]}, "has no 'content' text"),
    "unknown role": ({"messages": [{"role": "human", "content": "x"}]}, "has the role 'human': expected one of system"),
    "tool calls": ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "'tool_calls'"),
    "lengths": ({"tokens": ["a", "b"], "tags": ["O"]}, "2 'tokens' but 1 'tags'"),
    "no BIO": ({"tokens": ["a"], "tags": ["person"]}, "'tags' has 'person': expected BIO tags"),
    "tag number": ({"tokens": ["a"], "tags": [3]}, "'tags' has 3: expected BIO tags"),
    "blank token": ({"tokens": ["a", " "], "tags": ["O", "O"]}, "item 2 of 'tokens' is blank"),
    "token type": ({"tokens": [1], "tags": ["O"]}, "'tokens' is int 1: expected text"),
}


@pytest.mark.parametrize("record,expected", BAD_CELLS.values(), ids=BAD_CELLS)
def test_bad_cell(tmp_path, record, expected):
    path = write(tmp_path, "a.jsonl", json.dumps(record) + "\n")
    message = refusal(path)
    assert message.startswith(f"{path}:1: ") and expected in message


def test_csv_headers(tmp_path):
    assert "header names 'text' twice" in refusal(write(tmp_path, "a.csv", "text,text\na,b\n"))
    assert "empty column name" in refusal(write(tmp_path, "b.csv", "text,\na,b\n"))
    message = refusal(write(tmp_path, "c.csv", "good stuff,positive\nbad stuff,negative\n"))
    assert "found the columns 'good stuff', 'positive'" in message and "label: text, label" in message
    assert "a .csv separates by commas" in refusal(write(tmp_path, "d.csv", "text;label\na;b\n"))
    assert "not UTF-8: byte 0xff" in refusal(write(tmp_path, "e.csv", b"\xff\xfet\0e\0"))


def test_csv_rows(tmp_path):
    good = 'text,label\n"two\nlines, one cell",a\n'
    for line, expected in [
        (b"x\n", "1 cells, the header has 2"),
        (b"x,y,z\n", "3 cells, the header has 2"),
        (b"caf\xe9,a\n", "'text' is not UTF-8: byte 0xe9"),
        (b"x,\n", "'label' is blank"),
    ]:
        path = write(tmp_path, "a.csv", good.encode() + line + b"y,b\n")
        message = refusal(path)
        assert message.startswith(f"{path}:4: ") and expected in message
        got = read_rows(path, skip_bad_rows=True)
        assert list(got.rows) == [LabelRow("two\nlines, one cell", "a"), LabelRow("y", "b")]
        assert (got.counts.bad, list(got.lines)) == (1, [2, 5])
    path = write(tmp_path, "b.csv", good + '"never closed,a\n')
    assert f"{path}:4: malformed CSV" in refusal(path)
    assert "expected a list written as JSON" in refusal(write(tmp_path, "c.csv", "tokens,tags\na b,O O\n"))


def test_csv_accepts_a_byte_order_mark_tabs_and_long_cells(tmp_path):
    limit = csv.field_size_limit()
    long = "x" * (limit + 1)
    got = read_rows(write(tmp_path, "a.csv", b"\xef\xbb\xbf" + f"text\r\n{long}\r\n".encode()))
    assert list(got.rows) == [TextRow(long)]
    assert csv.field_size_limit() == limit
    assert list(read_rows(write(tmp_path, "a.tsv", "text\tlabel\na, b\tc\n")).rows) == [LabelRow("a, b", "c")]


def test_parquet_that_is_none(tmp_path):
    assert "not a readable Parquet file" in refusal(write(tmp_path, "a.parquet", b"PAR1 no, this is not one"))


def test_empty_rows_are_counted(tmp_path):
    rows = [{"prompt": "p", "completion": c} for c in ("a", " ", "", "b")]
    path = tmp_path / "a.jsonl"
    save(path, rows)
    got = read_rows(path)
    assert list(got.rows) == [PromptRow("p", "a"), PromptRow("p", "b")]
    assert (got.counts.rows, got.counts.empty, got.counts.bad) == (2, 2, 0)
    save(
        path, [{"messages": [{"role": "user", "content": "x"}]}, {"messages": [{"role": "assistant", "content": "y"}]}]
    )
    assert read_rows(path).counts.empty == 1


def test_layout(tmp_path):
    path = write(tmp_path, "a.jsonl", json.dumps({"text": "t", "prompt": "p", "completion": "c"}))
    assert "fit the layouts text and prompt: say which with layout" in refusal(path)
    assert list(read_rows(path, layout="prompt").rows) == [PromptRow("p", "c")]
    assert "needs 'label'" in refusal(path, layout="label")
    assert "unknown layout 'promt': did you mean 'prompt'" in refusal(path, layout="promt")
    path = write(tmp_path, "b.jsonl", json.dumps({"sentence": "t", "sentiment": 1}))
    message = refusal(path)
    assert (
        "found the columns 'sentence', 'sentiment', which fit no layout" in message and "tags: tokens, tags" in message
    )
    assert list(read_rows(path, columns={"text": "sentence", "label": "sentiment"}).rows) == [LabelRow("t", "1")]
    assert "did you mean 'sentence'" in refusal(path, columns={"text": "sentense"})
    assert "unknown field in columns 'txt'" in refusal(path, columns={"txt": "sentence"})
    assert list(read_rows(write(tmp_path, "c.jsonl", LABELLED), layout="text").rows) == [
        TextRow("good"),
        TextRow("bad"),
    ]


def labelled_set():
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
            "tokens": datasets.List(datasets.Value("string")),
            "tags": datasets.List(datasets.ClassLabel(names=["O", "B-per"])),
        }
    )
    rows = {"text": ["a", "b"], "label": [1, 0], "tokens": [["x", "y"], ["z"]], "tags": [[0, 1], [1]]}
    return datasets.Dataset.from_dict(rows, features=features)


def test_hub(monkeypatch):
    asked = []

    def load(*args, **options):
        asked.append((args, options))
        return labelled_set()

    monkeypatch.setattr(datasets, "load_dataset", load)
    got = read_rows("owner/name:config", layout="label", split="test")
    assert list(got.rows) == [LabelRow("a", "pos"), LabelRow("b", "neg")]
    assert asked == [(("owner/name", "config"), {"split": "test"})]
    assert (got.source, got.sha256, list(got.lines)) == ("owner/name:config", None, [1, 2])
    assert list(read_rows("name", layout="tags").rows) == [TagRow(["x", "y"], ["O", "B-per"]), TagRow(["z"], ["B-per"])]


def test_class_names_in_parquet(tmp_path):
    labelled_set().to_parquet(tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet", layout="label").rows) == [LabelRow("a", "pos"), LabelRow("b", "neg")]


@pytest.mark.parametrize(
    "error,kind,expected",
    [
        (ConnectionError("Couldn't reach\nthe hub"), RunError, "the hub cannot be reached or read"),
        (ValueError("Unknown split 'train'. Should be one of ['test']."), InputError, "Should be one of ['test']"),
        (datasets.exceptions.DatasetNotFoundError("no such thing"), InputError, "no file 'owner/name' here"),
    ],
)
def test_hub_refusals(monkeypatch, error, kind, expected):
    def load(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(kind) as caught:
        read_rows("owner/name")
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_hub_offline(tmp_path):
    code = (
        "from deltaw.data import read_rows\n"
        "try: read_rows('owner/name')\n"
        "except Exception as e: print(type(e).__name__, e)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = run.stdout.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("RunError cannot load the data set 'owner/name', split 'train'")
