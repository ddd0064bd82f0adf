"""Half a file is never left: whatever goes wrong, the old content stands and no temporary does."""

import errno
import json
import os
import stat

import pytest

from deltaw.core import files
from deltaw.core.errors import InputError, RunError
from deltaw.core.files import (
    as_os_error,
    atomic_file,
    atomic_folder,
    explain_os_error,
    sha256_file,
    sync_folder,
    write_json,
    write_text,
)


class Boom(Exception):
    pass


def tree(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def fail(code):
    def raiser(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return raiser


def test_a_new_file_appears_whole_with_the_umask_of_the_process(tmp_path):
    previous = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "deep" / "a.txt") as temporary:
            temporary.write_text("new")
            assert not (tmp_path / "deep" / "a.txt").exists()
    finally:
        os.umask(previous)
    assert tree(tmp_path) == {"deep/a.txt": "new"}
    assert stat.S_IMODE((tmp_path / "deep" / "a.txt").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [Boom(), KeyboardInterrupt(), InputError("x")])
def test_an_exception_inside_leaves_the_old_file(tmp_path, error):
    write_text(tmp_path / "a", "old")
    with pytest.raises(type(error)), atomic_file(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise error
    assert tree(tmp_path) == {"a": "old"}


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        (errno.ENOSPC, RunError, "no space left"),
        (errno.EDQUOT, RunError, "no space left"),
        (errno.EACCES, InputError, "you may write to"),
        (errno.EROFS, InputError, "Read-only file system"),
        (errno.EIO, RunError, "Input/output error"),
    ],
)
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_what_the_system_refuses_is_one_line_and_the_old_file_stands(tmp_path, monkeypatch, code, kind, says, call):
    write_text(tmp_path / "a", "old")
    monkeypatch.setattr(files.os, call, fail(code))
    with pytest.raises(kind, match=says) as caught:
        write_text(tmp_path / "a", "new")
    monkeypatch.undo()
    assert "\n" not in str(caught.value) and str(tmp_path / "a") in str(caught.value)
    assert tree(tmp_path) == {"a": "old"}


def test_a_path_under_a_file_is_an_input_error(tmp_path):
    (tmp_path / "a").write_text("old")
    for path in (tmp_path / "a" / "b", tmp_path / "a" / "b" / "c"):
        with pytest.raises(InputError, match="a file stands in a folder's place"):
            write_text(path, "new")
        with pytest.raises(InputError, match="a file stands in a folder's place"), atomic_folder(path):
            pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="or a folder in a file's"):
        write_text(tmp_path / "folder", "new")
    with pytest.raises(InputError, match="a file stands in a folder's place"), atomic_folder(tmp_path / "a"):
        pass
    assert tree(tmp_path) == {"a": "old"} and sorted(os.listdir(tmp_path)) == ["a", "folder"]


def test_a_missing_file_that_the_block_reads_is_named_and_not_the_target(tmp_path):
    with pytest.raises(InputError, match=r"no such file or folder: .*/missing$"), atomic_file(tmp_path / "a"):
        open(tmp_path / "missing")
    with pytest.raises(InputError, match=r"no such file or folder: .*/missing$"), atomic_folder(tmp_path / "f"):
        open(tmp_path / "missing")
    assert os.listdir(tmp_path) == []


def test_a_folder_is_replaced_whole(tmp_path):
    for content in ({"a": "1", "b": "2"}, {"b": "3"}):
        with atomic_folder(tmp_path / "out") as folder:
            for name, text in content.items():
                (folder / name).write_text(text)
        assert tree(tmp_path) == {f"out/{name}": text for name, text in content.items()}
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_keeps_others_replaces_its_own_names_and_patterns_only(tmp_path):
    out = tmp_path / "out"
    (out / "notes").mkdir(parents=True)
    (out / "notes" / "n.txt").write_text("mine")
    for name in ("model-1.safetensors", "model-2.safetensors", "config.json", "train.py"):
        (out / name).write_text("old")
    with atomic_folder(out, replaces=("model*.safetensors",)) as folder:
        (folder / "config.json").write_text("new")
        (folder / "model-1.safetensors").write_text("new")
    assert tree(out) == {
        "notes/n.txt": "mine", "train.py": "old", "config.json": "new", "model-1.safetensors": "new",
    }  # fmt: skip
    with atomic_folder(out, replaces=()):
        pass
    assert len(tree(out)) == 4 and sorted(os.listdir(tmp_path)) == ["out"]
    assert sorted(os.listdir(out)) == ["config.json", "model-1.safetensors", "notes", "train.py"]


@pytest.mark.parametrize("replaces", [None, (), ("a",)])
@pytest.mark.parametrize("error", [Boom(), KeyboardInterrupt(), RunError("x")])
def test_an_exception_inside_leaves_the_old_folder(tmp_path, replaces, error):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    with pytest.raises(type(error)), atomic_folder(tmp_path / "out", replaces=replaces) as folder:
        (folder / "a").write_text("half")
        raise error
    assert tree(tmp_path) == {"out/a": "old"}


@pytest.mark.parametrize("replaces", [None, (), ("*",)])
@pytest.mark.parametrize("failing", range(4))
def test_a_rename_that_fails_midway_puts_everything_back(tmp_path, monkeypatch, replaces, failing):
    out = tmp_path / "out"
    out.mkdir()
    for name in "abc":
        (out / name).write_text("old")
    before, real, calls = tree(tmp_path), os.rename, []

    def rename(source, target):
        calls.append(source)
        if len(calls) == failing + 1:
            fail(errno.ENOSPC)()
        real(source, target)

    monkeypatch.setattr(files.os, "rename", rename)
    done = False
    try:
        with atomic_folder(out, replaces=replaces) as folder:
            (folder / "a").write_text("new")
            (folder / "b").write_text("new")
        done = True
    except RunError as error:
        assert "no space left" in str(error)
    monkeypatch.undo()
    # Replaced whole takes two renames, so that a third cannot fail.
    assert done == (failing >= len(calls))
    assert done or tree(tmp_path) == before
    assert os.listdir(tmp_path) == ["out"] and not [n for n in os.listdir(out) if n.startswith(".")]


def test_the_current_folder_can_be_the_target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("mine")
    with atomic_folder(".", replaces=()) as folder:
        (folder / "a").write_text("new")
    assert tree(tmp_path) == {"a": "new", "mine": "mine"}


def test_json_refuses_what_json_has_not_and_keeps_the_old(tmp_path):
    write_json(tmp_path / "a.json", {"ä": 1.5})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ä": 1.5}
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            write_json(tmp_path / "a.json", {"x": bad})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ä": 1.5}
    assert os.listdir(tmp_path) == ["a.json"]


def test_sha256_and_sync(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    sync_folder(tmp_path)


def test_system_errors_told_in_text_are_found():
    found = as_os_error(Exception("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert found.errno == errno.ENOSPC
    assert isinstance(explain_os_error(found, "x"), RunError)
    assert str(explain_os_error(as_os_error(Exception("two\nlines")), "x")) == "x: two lines"
