"""The report on a machine, on a fake driver and without one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from pipelive_kv import transport
from pipelive_kv.cli import main
from pipelive_kv.doctor import examine
from tests.cuda_fake import FakeCuda, FakeNvrtc


def test_a_machine_without_a_driver_is_healthy_on_the_cpu() -> None:
    report = examine(driver_library="libnot_there.so.7")
    assert report.driver_version is None
    assert report.gpus == ()
    assert any("libnot_there.so.7" in sentence for sentence in report.missing)
    assert "Everything works on the CPU" in str(report)
    assert json.loads(report.to_json())["gpus"] == []


def test_two_devices_of_the_fake_driver() -> None:
    fake = FakeCuda(devices=2)
    report = examine(driver_library=fake.path)
    assert report.driver_version == "12.8"
    assert [gpu.index for gpu in report.gpus] == [0, 1]
    gpu = report.gpus[1]
    assert gpu.problem == ""
    assert (gpu.compute_capability, gpu.granularity) == ((9, 0), 2 << 20)
    assert (gpu.exportable, gpu.rdma, gpu.peers) == (True, True, (0,))
    assert gpu.memory_free == gpu.memory_total == 4 << 30
    assert gpu.uuid == "GPU-00000000-0000-0000-0000-000000000002"
    assert "4.0 of 4.0 GiB free" in str(report)
    assert "cuda:1" in str(report)
    assert fake.held == 0
    assert fake.mistakes == ""


def test_a_device_that_cannot_be_used_is_no_reason_to_fail() -> None:
    fake = FakeCuda()
    fake.library.fake_driver_attribute(102, 0)
    report = examine(driver_library=fake.path)
    assert "virtual memory management" in report.gpus[0].problem
    assert any("cannot be used" in sentence for sentence in report.missing)
    fake = FakeCuda()
    fake.fail("cuDevicePrimaryCtxRetain", 2)
    assert "cuDevicePrimaryCtxRetain" in examine(driver_library=fake.path).gpus[0].problem


def test_kernels_are_missing_only_where_nvrtc_is_too() -> None:
    fake = FakeCuda()
    fake.library.fake_driver_version(1000)  # a driver that nothing real suits
    sentences = examine(driver_library=fake.path).missing
    problem = next(sentence for sentence in sentences if "has no kernels" in sentence)
    assert "cuda:0" in problem
    assert "nvidia-cuda-nvrtc-cu12" in problem
    nvrtc = FakeNvrtc()
    try:
        report = examine(driver_library=fake.path)
        assert report.gpus[0].kernel_problem == ""
        assert not any("kernels" in sentence for sentence in report.missing)
        assert nvrtc.compiled == ["probe.cu"]  # a kernel that does nothing, to see that it can
    finally:
        nvrtc.close()


@dataclass
class _Nccl:
    version: str
    problem: str


@pytest.mark.parametrize(
    ("probe", "shown"),
    [
        (lambda: {"version": "2.30.7", "abilities": ["abort", "split"]}, "abilities abort/split"),
        (lambda: _Nccl("", "libnccl.so.2 is not there"), "problem libnccl.so.2 is not there"),
    ],
)
def test_the_nccl_transport_is_asked(
    probe: Callable[[], object], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "nccl_probe", probe, raising=False)
    fake = FakeCuda()
    report = examine(driver_library=fake.path)
    assert shown in str(report)
    assert any("NCCL" in sentence for sentence in report.missing) == ("problem" in shown)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "CUDA driver" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"]
