"""The report on a machine, on a fake driver and without one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from pipelive_kv import transport
from pipelive_kv.cli import main
from pipelive_kv.doctor import examine, runs_on
from tests.cuda_fake import FakeCuda


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


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        (("sm_90",), (9, 0), True),
        (("sm_80",), (8, 6), True),
        (("sm_86",), (8, 0), False),
        (("sm_80",), (9, 0), False),
        (("sm_80", "compute_80"), (9, 0), True),
        (("sm_100", "compute_100"), (12, 0), True),
        (("sm_100", "compute_100"), (9, 0), False),
        ((), (9, 0), False),
    ],
)
def test_what_kernels_run_on(
    archs: tuple[str, ...], capability: tuple[int, int], expected: bool
) -> None:
    assert runs_on(archs, capability) == expected


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
