import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from deltaw.core.errors import InputError, RunError
from deltaw.data import example_data
from deltaw.data.example_data import DOMAINS, VADER, clean_text, vader_rows, write_example
from deltaw.models.packages import PinnedFile, cache_folder

TWEETS = [
    "1\t2.5\tI  love   this &amp; that &lt;3",
    "2\t-1.0\tso ''bad'' caf\u00e9",
    "3\t0.2\tjust a day",
    "4\t1.0\tI LOVE this, that... 3!",
    "5\t-0.5\tmeh",
    "6\t0.99\tgood",
    "7\t3.0\t!!!",
    "8\t1\tat &amp;#38; t, e\u0301",
    "9\t-0.49\t'twas",
]
EXPECTED = [
    ("I love this & that <3", "positive", 2.5),
    ('so "bad" café', "negative", -1.0),
    ("at & t, é", "positive", 1.0),
]


def tar_gz(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
            else:
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content or b""))
    return buffer.getvalue()


def ground_truth(lines):
    return "\r\n".join(lines).encode()


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Puts a source distribution with the given inner files where it is looked for."""
    monkeypatch.setenv("DELTAW_PACKAGES", str(tmp_path))
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))

    def put(files, outer=None):
        inner = tar_gz({f"hutto_ICWSM_2014/{stem}_GroundTruth.txt": content for stem, content in files.items()})
        content = tar_gz({example_data._INNER: inner}) if outer is None else outer
        (tmp_path / VADER.filename).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        pinned = PinnedFile(VADER.project, VADER.version, VADER.filename, digest, len(content))
        monkeypatch.setattr(example_data, "VADER", pinned)

    return put


def test_two_classes(serve):
    serve({"tweets": ground_truth(TWEETS)})
    rows = vader_rows("tweets")
    assert [(row["text"], row["label"], row["rating"]) for row in rows] == EXPECTED
    assert vader_rows("tweets", classes=2) == rows


def test_three_classes(serve):
    serve({"nytEditorialSnippets": ground_truth(TWEETS)})
    rows = vader_rows("editorials", classes=3)
    labels = [(row["text"], row["label"]) for row in rows]
    assert labels == [
        *((text, label) for text, label, _ in EXPECTED[:2]),
        ("just a day", "neutral"),
        ("meh", "negative"),
        ("good", "positive"),
        ("at & t, é", "positive"),
        ("'twas", "neutral"),
    ]


@pytest.mark.parametrize("domain", DOMAINS)
def test_each_domain_reads_its_own_file(serve, domain):
    serve({stem: ground_truth([f"1\t2\tof {name}"]) for name, stem in DOMAINS.items()})
    assert vader_rows(domain) == [{"text": f"of {domain}", "label": "positive", "rating": 2.0}]


def test_write_example(serve, tmp_path):
    serve({"movieReviewSnippets": ground_truth(TWEETS)})
    path = tmp_path / "out/movies.jsonl"
    assert write_example(path, "movies") == 3
    lines = path.read_text(encoding="utf-8").split("\n")
    assert lines.pop() == "" and [json.loads(line) for line in lines] == [
        {"text": text, "label": label} for text, label, _ in EXPECTED
    ]


def test_clean_text():
    assert clean_text("A &amp;amp; B &lt;&lt;3\u00a0 x\t''y''") == 'A & B <<3 x "y"'


def test_wrong_names():
    with pytest.raises(InputError, match="did you mean 'tweets'"):
        vader_rows("tweet")
    with pytest.raises(InputError, match="expected 2 or 3"):
        vader_rows("tweets", classes=4)


@pytest.mark.parametrize(
    "content",
    [b"1\t0.5\n", b"1\tx\ttext", b"1\t2\t\xff\xfe", None, b"1\t2\ta\tb"],
    ids=["few", "word", "bytes", "link", "many"],
)
def test_malformed_archive(serve, content):
    serve({"tweets": content})
    with pytest.raises(RunError, match="cannot be read as vaderSentiment") as caught:
        vader_rows("tweets")
    assert "\n" not in str(caught.value)


def test_other_archives(serve, monkeypatch):
    for outer in (b"no archive", tar_gz({"a": b"b"}), tar_gz({example_data._INNER: b"no archive"})):
        serve({}, outer=outer)
        with pytest.raises(RunError, match="cannot be read"):
            vader_rows("tweets")
    serve({"tweets": ground_truth(TWEETS)})
    monkeypatch.setattr(example_data, "_LIMIT_BYTES", 10)
    with pytest.raises(RunError, match="at most 10 bytes"):
        vader_rows("tweets")


FOLDERS = [Path(p) for p in (os.environ.get("DELTAW_PACKAGES"), cache_folder() / "packages") if p]
REAL = next((p / VADER.filename for p in FOLDERS if (p / VADER.filename).is_file()), None)


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="the source distribution is neither in the cache nor in DELTAW_PACKAGES")
def test_real_counts(monkeypatch):
    monkeypatch.setenv("DELTAW_PACKAGES", str(REAL.parent))
    counts = {(domain, n): len(vader_rows(domain, classes=n)) for domain in DOMAINS for n in (2, 3)}
    assert counts == {
        ("tweets", 2): 2513,
        ("tweets", 3): 4045,
        ("amazon", 2): 2439,
        ("amazon", 3): 3687,
        ("editorials", 2): 1530,
        ("editorials", 3): 5118,
        ("movies", 2): 9171,
        ("movies", 3): 10603,
    }
    rows = [row for domain in DOMAINS for row in vader_rows(domain, classes=3)]
    assert not any("&amp" in row["text"] or "  " in row["text"] or "\ufffd" in row["text"] for row in rows)
