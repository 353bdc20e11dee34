"""What a build says about itself, and a kernel on a real device where there is one."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from pipelive_kv import _core
from pipelive_kv.build_info import BuildInfo, CudaDriver, build_info, cuda_scale
from tests.cuda_fake import FakeCuda, FakeNvrtc

ROOT = Path(__file__).parents[1]


def test_version_is_the_one_in_pyproject() -> None:
    match = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert match is not None
    assert build_info().version == match[1]


def test_says_how_it_was_built() -> None:
    info = build_info()
    assert re.match(r"(GNU|Clang|AppleClang) \d+", info.compiler)
    assert info.build_type in {"Release", "RelWithDebInfo", "Debug", "MinSizeRel"}
    assert info.baseline_isa
    assert info.attention_isa[0] == "portable"
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.version = "2"  # type: ignore[misc]


def test_cuda_fields_agree_with_each_other() -> None:
    info = build_info()
    present = {
        bool(info.cuda_compiler),
        bool(info.cuda_archs),
        bool(info.cuda_kernels),
        info.cuda_fatbin_bytes > 0,
    }
    assert present == {info.cuda_compiled}
    assert bool(info.driver.problem) == (not info.driver.devices)


def test_a_missing_driver_is_reported_not_raised() -> None:
    info = build_info(driver_library="libnot_there.so.7")
    assert info.driver.version is None
    assert info.driver.devices == ()
    assert "libnot_there.so.7" in info.driver.problem


@pytest.mark.parametrize(
    ("kernels", "kernel_problem", "problem", "missing"),
    [
        ((), "", "", ""),  # NVRTC does
        ((), "no NVRTC", "", "without nvcc, and cannot be compiled here: no NVRTC"),
        ((), "", "no driver", "no driver"),
        (("scale",), "", "no driver", "no driver"),
        (("scale",), "", "", ""),
    ],
)
def test_names_what_is_missing_for_cuda(
    kernels: tuple[str, ...], kernel_problem: str, problem: str, missing: str
) -> None:
    driver = CudaDriver(version=None, devices=(), problem=problem)
    info = dataclasses.replace(
        build_info(), cuda_kernels=kernels, kernel_problem=kernel_problem, driver=driver
    )
    assert (info.cuda_missing == "") == (missing == "")
    assert missing in info.cuda_missing


def test_a_build_without_kernels_asks_for_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    built = _core.build_info()
    monkeypatch.setattr(_core, "build_info", lambda: {**built, "cuda_kernels": []})
    fake = FakeCuda()
    fake.library.fake_driver_version(1000)  # a driver that nothing real suits
    assert "NVRTC" in build_info(driver_library=fake.path).cuda_missing
    nvrtc = FakeNvrtc()
    try:
        assert build_info(driver_library=fake.path).cuda_missing == ""
    finally:
        nvrtc.close()


def test_prints_every_field() -> None:
    info = build_info()
    text = str(info)
    for field in dataclasses.fields(BuildInfo):
        assert ("cuda_driver" if field.name == "driver" else field.name) in text


def test_without_driver_the_kernel_check_says_so() -> None:
    with pytest.raises(_core.DeviceError, match=r"libnot_there\.so\.7|without nvcc"):
        cuda_scale([1.0], 2.0, driver_library="libnot_there.so.7")


@pytest.mark.gpu
@pytest.mark.small
def test_kernel_runs_on_the_device() -> None:
    values = np.linspace(-3, 3, 1_000_003, dtype=np.float32).reshape(-1, 1)
    scaled = cuda_scale(values, 2.5)
    np.testing.assert_array_equal(scaled, values * np.float32(2.5))


@pytest.mark.gpu
@pytest.mark.small
def test_a_device_that_is_not_there_is_refused() -> None:
    count = len(build_info().driver.devices)
    with pytest.raises(_core.InvalidArgumentError, match=f"device is {count}"):
        cuda_scale([1.0], 2.0, device=count)
