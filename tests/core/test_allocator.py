"""The allocator's setting: there before torch asks for it, and never in the place of someone's own."""

from __future__ import annotations

import os
import platform
import sys

import pytest

from deltaw.core.allocator import use_expandable_segments

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in NAMES:
        # Set first, so that what the test leaves behind is taken away.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "release", lambda: "6.1.0")


def test_segments_are_expandable_where_nobody_chose():
    use_expandable_segments()
    assert [os.environ.get(name) for name in NAMES] == ["expandable_segments:True", None, None]


@pytest.mark.parametrize("name", NAMES)
def test_a_choice_stays(name, monkeypatch):
    monkeypatch.setenv(name, "max_split_size_mb:64")
    use_expandable_segments()
    assert {known: os.environ[known] for known in NAMES if known in os.environ} == {name: "max_split_size_mb:64"}


def test_not_where_they_are_not_known_to_work(monkeypatch):
    monkeypatch.setattr(platform, "release", lambda: "5.15.167.4-microsoft-standard-WSL2")
    use_expandable_segments()
    monkeypatch.setattr(platform, "release", lambda: "10")
    monkeypatch.setattr(sys, "platform", "win32")
    use_expandable_segments()
    assert not set(NAMES) & set(os.environ)


@pytest.mark.gpu
def test_torch_takes_it():
    import subprocess

    code = (
        "from deltaw.core.allocator import use_expandable_segments; use_expandable_segments(); import torch;"
        "x = torch.empty(1 << 26, device='cuda');"
        "print(all(s['is_expandable'] for s in torch.cuda.memory_snapshot()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
