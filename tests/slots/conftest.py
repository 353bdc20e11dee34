"""Slots on a GPU: every test runs on the stand-in for the driver, and on a GPU where one is."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from gpu_memory import FakeGpu, Gpu, RealGpu

from pipelive_kv import _core
from pipelive_kv.build_info import build_info


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    """A device, and what tests need to put numbers on it and read them back."""
    if "slots_copy" not in build_info().cuda_kernels:
        pytest.skip("this build carries no CUDA kernels (it was compiled without nvcc)")
    if request.param == "real":
        yield RealGpu()
        return
    fake = FakeGpu()
    yield fake
    fake.close()
    gc.collect()
    _core.cuda_forget_slots()
    gc.collect()
    assert fake.cuda.mistakes == ""
