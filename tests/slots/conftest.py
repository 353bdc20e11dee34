"""Slots on a GPU: every test runs on the stand-in for the driver, and on a GPU where one is."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from gpu_memory import FakeGpu, Gpu, RealGpu

from pipelive_kv import _core


@pytest.fixture
def fake_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """The stand-in alone, for what no GPU can be made to do; checks its calls."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fake = FakeGpu()
    yield fake
    fake.close()
    gc.collect()
    _core.cuda_forget_kernels()
    gc.collect()
    assert fake.cuda.mistakes == ""


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest) -> Gpu:
    """A device, and what tests need to put numbers on it and read them back."""
    if request.param == "real":
        return RealGpu()
    fake: FakeGpu = request.getfixturevalue("fake_gpu")
    return fake
