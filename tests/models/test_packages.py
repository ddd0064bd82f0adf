import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from deltaw.core.errors import InputError, RunError
from deltaw.core.files import write_json
from deltaw.models import packages
from deltaw.models.cached import MANIFEST, cached_folder
from deltaw.models.packages import PinnedFile, cache_folder, fetch

CONTENT = bytes(range(256)) * 8192
NAME = "some_thing-1.0-py3-none-any.whl"
PINNED = PinnedFile("Some.Thing", "1.0", NAME, hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))


class Index(http.server.ThreadingHTTPServer):
    """A package index of one file. Attributes say how it behaves."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.json, self.hashes = CONTENT, True, True
        self.send_first: list[int] = []  # bytes to send of the first downloads, before the connection is cut
        self.stall_s, self.password, self.asked = 0.0, "", []
        self.elsewhere = ""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/simple"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        index = self.server
        index.asked.append((self.path, self.headers.get("Authorization")))
        if index.password and not self.headers.get("Authorization"):
            return self.reply(401, b"", "text/plain")
        if self.path == "/simple/some-thing/":
            digest = hashlib.sha256(index.content).hexdigest() if index.hashes else ""
            link = f"../../files/{NAME}"
            if index.json:
                hashes = {"sha256": digest} if digest else {}
                others = [{"filename": "some_thing-0.9.tar.gz", "url": "../x", "hashes": {}}]
                page = json.dumps({"files": [*others, {"filename": NAME, "url": link, "hashes": hashes}]})
                return self.reply(200, page.encode(), "application/vnd.pypi.simple.v1+json")
            anchor = f'<a href="{link}{"#sha256=" + digest if digest else ""}">{NAME}</a>'
            return self.reply(200, f"<html><a href='../x/other.whl'>o</a>{anchor}".encode(), "text/html; charset=utf-8")
        if self.path == f"/files/{NAME}":
            if index.elsewhere:
                self.send_response(302)
                self.send_header("Location", index.elsewhere)
                self.send_header("Content-Length", "0")
                return self.end_headers()
            sent = index.send_first.pop(0) if index.send_first else None
            return self.reply(200, index.content, "application/octet-stream", sent)
        return self.reply(404, b"nothing", "text/plain")

    def reply(self, code, body, kind, sent=None):
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:sent])
        if sent is not None and self.server.stall_s:
            self.wfile.flush()
            time.sleep(self.server.stall_s)


@pytest.fixture
def make_index():
    made = []

    def make():
        index = Index()
        thread = threading.Thread(target=index.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        made.append((index, thread))
        return index

    yield make
    for index, thread in made:
        index.shutdown()
        index.server_close()
        thread.join()


@pytest.fixture
def index(make_index):
    return make_index()


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path, request):
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CERT", "DELTAW_PACKAGES", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    if "index" in request.fixturenames:
        monkeypatch.setenv("PIP_INDEX_URL", request.getfixturevalue("index").url)
    else:
        monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "no-index").as_uri())


def in_cache(tmp_path):
    return (
        sorted(file.name for file in (tmp_path / "cache/packages").glob("*")) if (tmp_path / "cache").exists() else []
    )


def test_cache_folder_order(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("DELTAW_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/deltaw"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home/.cache/deltaw"


@pytest.mark.parametrize("json_page", [True, False])
@pytest.mark.parametrize("hashes", [True, False])
def test_fetches_once_with_progress(index, tmp_path, json_page, hashes):
    index.json, index.hashes = json_page, hashes
    told = []
    path = fetch(PINNED, progress=lambda what, done, total: told.append((what, done, total)))
    assert path == tmp_path / "cache/packages" / NAME and path.read_bytes() == CONTENT
    assert told[-1] == (NAME, len(CONTENT), len(CONTENT)) and len(told) >= 2
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    asked = len(index.asked)
    assert fetch(PINNED) == path
    assert len(index.asked) == asked


def test_explicit_cache(index, tmp_path):
    assert fetch(PINNED, cache=tmp_path / "other") == tmp_path / "other/packages" / NAME
    assert in_cache(tmp_path) == []


@pytest.mark.parametrize("stated", [True, False])
def test_wrong_hash_names_both_and_leaves_nothing(index, tmp_path, stated):
    index.hashes = stated
    index.content = CONTENT[:-1] + b"!"
    wrong = hashlib.sha256(index.content).hexdigest()
    with pytest.raises(RunError) as caught:
        fetch(PINNED)
    message = str(caught.value)
    assert wrong in message and PINNED.sha256 in message and "\n" not in message
    assert in_cache(tmp_path) == []
    downloaded = [path for path, _ in index.asked if path.startswith("/files")]
    assert len(downloaded) == (0 if stated else 1)


@pytest.mark.parametrize("content", [CONTENT + b"more", CONTENT[:1000]])
def test_wrong_size_is_refused_without_retrying(index, tmp_path, content):
    index.hashes, index.content = False, content
    with pytest.raises(RunError, match=f"expected {PINNED.sha256}"):
        fetch(PINNED)
    assert in_cache(tmp_path) == [] and sum(path.startswith("/files") for path, _ in index.asked) == 1


def test_a_broken_download_is_tried_again(index, tmp_path, monkeypatch):
    monkeypatch.setattr(packages.time, "sleep", lambda _: None)
    index.send_first = [700_000]
    assert fetch(PINNED).read_bytes() == CONTENT
    assert in_cache(tmp_path) == [NAME]


def test_truncated_download(index, tmp_path, monkeypatch):
    monkeypatch.setattr(packages.time, "sleep", lambda _: None)
    index.send_first = [700_000] * 10
    with pytest.raises(RunError, match=r"after 700000 of 2097152 bytes.*pip download --no-deps.*Some.Thing==1.0"):
        fetch(PINNED)
    assert in_cache(tmp_path) == []


def test_no_network_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_INDEX_URL", "http://someone:secret@127.0.0.1:9/simple")
    with pytest.raises(RunError) as caught:
        fetch(PINNED)
    message = str(caught.value)
    for part in (NAME, "2.1 MB", "http://127.0.0.1:9/simple", str(tmp_path / "cache/packages"), "DELTAW_PACKAGES"):
        assert part in message
    assert "`pip download --no-deps --only-binary :all: Some.Thing==1.0`" in message
    assert "`deltaw train --model FOLDER --data FILE`" in message
    assert "\n" not in message and "secret" not in message and in_cache(tmp_path) == []


def test_index_without_the_file(index):
    with pytest.raises(RunError, match=r"no such file at http://127\.0\.0\.1"):
        fetch(PinnedFile("absent", "1", "absent-1.tar.gz", "0" * 64, 1))


def test_unreadable_page(index, monkeypatch):
    monkeypatch.setattr(json, "dumps", lambda *_, **__: '{"files": 3}')
    with pytest.raises(RunError, match="cannot be read"):
        fetch(PINNED)


def test_extra_index_and_file_index(index, tmp_path, monkeypatch):
    page = tmp_path / "simple/some-thing/index.html"
    page.parent.mkdir(parents=True)
    page.write_text(f'<a href="../../{NAME}">x</a>')
    (tmp_path / NAME).write_bytes(CONTENT)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{(tmp_path / 'none').as_uri()} {(tmp_path / 'simple').as_uri()}")
    assert fetch(PINNED).read_bytes() == CONTENT
    assert index.asked == []


def test_a_page_from_the_network_cannot_name_a_local_file(index, tmp_path, monkeypatch):
    (tmp_path / NAME).write_bytes(CONTENT)
    real = json.dumps
    file = {"filename": NAME, "url": (tmp_path / NAME).as_uri(), "hashes": {}}
    monkeypatch.setattr(json, "dumps", lambda *_, **__: real({"files": [file]}))
    with pytest.raises(RunError, match="no such file at"):
        fetch(PINNED)


def test_password_goes_to_the_index_only(index, make_index, monkeypatch):
    other = make_index()
    index.password, index.elsewhere = "needed", f"{other.url.removesuffix('/simple')}/files/{NAME}"
    monkeypatch.setenv("PIP_INDEX_URL", index.url.replace("http://", "http://me:p%40ss@"))
    assert fetch(PINNED).read_bytes() == CONTENT
    assert {header for _, header in index.asked} == {"Basic bWU6cEBzcw=="}
    assert [header for _, header in other.asked] == [None]


def test_pip_configuration_file(index, tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_INDEX_URL")
    (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = {index.url}\nfind-links =\n    {tmp_path}/a\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    assert fetch(PINNED).read_bytes() == CONTENT
    assert packages._find_links() == [tmp_path / "a"]
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert packages._indexes() == ["https://pypi.org/simple"]


@pytest.mark.parametrize("variable", ["DELTAW_PACKAGES", "PIP_FIND_LINKS"])
def test_folder_before_network(tmp_path, monkeypatch, variable):
    folder = tmp_path / "by-hand"
    folder.mkdir()
    (folder / NAME).write_bytes(CONTENT)
    monkeypatch.setenv(variable, str(folder))
    assert fetch(PINNED) == folder / NAME
    assert in_cache(tmp_path) == []


def test_wrong_file_in_a_named_folder(index, tmp_path, monkeypatch):
    (tmp_path / NAME).write_bytes(b"other")
    monkeypatch.setenv("DELTAW_PACKAGES", str(tmp_path))
    with pytest.raises(RunError, match=hashlib.sha256(b"other").hexdigest()):
        fetch(PINNED)
    monkeypatch.delenv("DELTAW_PACKAGES")
    monkeypatch.setenv("PIP_FIND_LINKS", tmp_path.as_uri())
    assert fetch(PINNED).read_bytes() == CONTENT


def test_damaged_cache_is_fetched_again(index, tmp_path):
    path = fetch(PINNED)
    path.write_bytes(CONTENT[:-1] + b"x")
    assert fetch(PINNED).read_bytes() == CONTENT


def test_concurrent_fetches(index, tmp_path):
    results = []
    threads = [threading.Thread(target=lambda: results.append(fetch(PINNED).read_bytes())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [CONTENT] * 6 and in_cache(tmp_path) == [NAME]


def test_interrupted_leaves_nothing(index, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(PINNED, progress=stop)
    assert in_cache(tmp_path) == []


def test_killed_process_leaves_no_harm(index, tmp_path):
    index.send_first, index.stall_s = [1_200_000], 5.0
    code = (
        "from deltaw.models.packages import *\n"
        f"fetch(PinnedFile('Some.Thing', '1.0', {NAME!r}, {PINNED.sha256!r}, {PINNED.size}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    folder = tmp_path / "cache/packages"
    deadline = time.monotonic() + 30
    while not any(file.stat().st_size for file in folder.glob(".*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left,) = folder.glob(".*.tmp")
    assert 0 < left.stat().st_size < len(CONTENT)
    assert fetch(PINNED).read_bytes() == CONTENT
    assert left.exists()  # it may be a download that still runs
    os.utime(left, (time.time() - 7200,) * 2)
    (folder / NAME).unlink()
    fetch(PINNED)
    assert in_cache(tmp_path) == [NAME]


def test_read_only_cache(index, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(InputError, match=r"cannot write to .*\.whl.*DELTAW_CACHE"):
        fetch(PINNED)
    assert in_cache(tmp_path) == []


def build_some(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub/a.bin").write_bytes(CONTENT)
    (folder / "b.txt").write_text("b")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def damage_byte(folder):
    content = bytearray(CONTENT)
    content[5] ^= 1
    (folder / "sub/a.bin").write_bytes(content)


DAMAGE = {
    "byte": damage_byte,
    "short": lambda folder: (folder / "sub/a.bin").write_bytes(b"x"),
    "missing": lambda folder: (folder / "b.txt").unlink(),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "bad manifest": lambda folder: (folder / MANIFEST).write_text("[]"),
    "no files": lambda folder: write_json(folder / MANIFEST, {"format": 1, "made_from": {"v": 1}, "files": {}}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folder_is_built_again(tmp_path, damage):
    target = tmp_path / "models/x"
    cached_folder(target, {"v": 1}, build_some)
    good = files_of(target)
    stamp = (target / "b.txt").stat().st_mtime_ns
    assert cached_folder(target, {"v": 1}, lambda _: pytest.fail("it is intact")) == target
    assert (target / "b.txt").stat().st_mtime_ns == stamp
    DAMAGE[damage](target)
    cached_folder(target, {"v": 1}, build_some)
    assert files_of(target) == good and [p.name for p in target.parent.iterdir()] == ["x"]


def test_other_source_builds_again_and_failure_keeps_the_old(tmp_path):
    target = tmp_path / "models/x"
    cached_folder(target, {"v": 1}, build_some)
    good = files_of(target)

    def fail(folder):
        build_some(folder)
        raise RunError("no luck")

    with pytest.raises(RunError, match="no luck"):
        cached_folder(target, {"v": 2}, fail)
    assert files_of(target) == good and [p.name for p in target.parent.iterdir()] == ["x"]


def test_two_builders_at_once(tmp_path):
    target, meet, results = tmp_path / "models/x", threading.Barrier(2), []

    def build(folder):
        build_some(folder)
        meet.wait(10)

    threads = [
        threading.Thread(target=lambda: results.append(cached_folder(target, {"v": 1}, build))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [target, target]
    assert files_of(target)["sub/a.bin"] == CONTENT and [p.name for p in target.parent.iterdir()] == ["x"]


def test_stale_folders_are_removed(tmp_path):
    target = tmp_path / "models/x"
    for name, age_s in ((".x.dead.tmp", 7200), (".x.live.tmp", 5), (".x.dead.old", 7200)):
        (target.parent / name).mkdir(parents=True)
        (target.parent / name / "f").write_bytes(b"1")
        for path in (target.parent / name / "f", target.parent / name):
            os.utime(path, (time.time() - age_s,) * 2)
    cached_folder(target, {"v": 1}, build_some)
    assert sorted(p.name for p in target.parent.iterdir()) == [".x.live.tmp", "x"]


def test_read_only_folder_cache(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(InputError, match="DELTAW_CACHE"):
        cached_folder(tmp_path / "models/x", {"v": 1}, build_some)
