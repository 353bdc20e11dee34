"""How NCCL is set up, or left out, with a fake NCCL."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time
from pathlib import Path

import pytest
from tests.cuda_fake import FakeCuda
from tests.transport.ends import KEY, SECONDS, exchange, pair, soon

from pipelive_kv import _core
from pipelive_kv.errors import DeadlineError, InvalidArgumentError
from pipelive_kv.memory import open_device
from pipelive_kv.transport import (
    DeviceTurn,
    PatchListener,
    abilities,
    nccl_probe,
    paths,
)

FAKE_SETTINGS = (
    b"stall",
    b"stall_init",
    b"fail_init",
    b"fail_init_rank",
    b"fail_first_rank",
    b"hold_abort",
    b"version",
)


@pytest.fixture
def fake_nccl(monkeypatch):
    """The stand-in for libnccl that the C++ tests build."""
    root = Path(__file__).parents[2]
    found = os.environ.get("PIPELIVE_FAKE_NCCL") or next(
        (str(path) for path in sorted(root.glob("build/*/cuda/libpipelive_fake_nccl.so"))), ""
    )
    if not found:
        pytest.skip("the fake NCCL is not built: configure with PIPELIVE_BUILD_TESTS=ON")
    for module in ("paths", "nccl"):
        monkeypatch.setattr(f"pipelive_kv.transport.{module}.nccl_candidates", lambda: [found])
    library = ctypes.CDLL(found)
    before = library.fake_nccl_count(b"violations")
    yield library
    for name in FAKE_SETTINGS:
        library.fake_nccl_set(name, 0)
    assert library.fake_nccl_count(b"violations") == before


def test_nccl_is_found(fake_nccl):
    probe = nccl_probe()
    assert (probe.version, probe.version_code, probe.problem) == ("2.27.3", 22703, "")
    assert probe.launch_order
    assert not probe.multi_rank_gpu


def test_a_missing_nccl_is_explained(monkeypatch):
    monkeypatch.setattr("pipelive_kv.transport.nccl.nccl_candidates", lambda: ["/nowhere/l.so"])
    probe = nccl_probe()
    assert not probe.version
    assert "/nowhere/l.so" in probe.problem


def test_one_rank_exchanges_with_itself(fake_nccl):
    comm = _core.NcclComm(
        paths.nccl_candidates(),
        open_device("cpu"),
        _core.nccl_unique_id(paths.nccl_candidates()),
        0,
        1,
        SECONDS,
    )
    out = (ctypes.c_char * 1000)(*b"x" * 1000)
    into = (ctypes.c_char * 1000)()
    comm.exchange(ctypes.addressof(out), ctypes.addressof(into), 1000, 0, SECONDS)
    assert bytes(into) == bytes(out)
    comm.abort()


def test_a_unique_id_of_the_wrong_length_is_refused(fake_nccl):
    with pytest.raises(InvalidArgumentError, match="unique_id has 3 bytes"):
        _core.NcclComm(paths.nccl_candidates(), open_device("cpu"), b"abc", 0, 1, 1.0)


def test_turns(fake_nccl):
    engine = DeviceTurn("test:0", holder="an all-reduce", timeout=0.05)
    patch = DeviceTurn("test:0", holder="a patch")
    with engine:
        assert patch.holder == "an all-reduce"
        assert not patch.try_take()
        with pytest.raises(DeadlineError, match="an all-reduce"):
            patch.take(0.01)
    assert patch.try_take()
    with pytest.raises(DeadlineError, match="a patch"), engine:
        pass
    patch.give()
    with pytest.raises(InvalidArgumentError):
        patch.give()


@pytest.fixture
def two_gpus(fake_nccl, monkeypatch):
    """Two devices of a fake driver, which NCCL may take for one, and no p2p between them."""
    cuda = FakeCuda(devices=2)
    fake_nccl.fake_nccl_set(b"version", 23004)
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(abilities, "_no_p2p", lambda *_: "a test wants none")
    devices = [cuda.device(0), cuda.device(1)]
    yield devices
    devices.clear()
    for name in FAKE_SETTINGS:
        fake_nccl.fake_nccl_set(name, 0)
    # What ends in the background lets go of the devices; a test that failed holds them.
    end = soon()
    while cuda.library.fake_driver_held() and time.monotonic() < end:
        gc.collect()
    assert cuda.mistakes == ""


def auto_pair(pool, two_gpus, timeout=SECONDS):
    return pair(pool, "auto", device=two_gpus[0], listener_device=two_gpus[1], timeout=timeout)


def test_auto_takes_nccl_and_has_transferred_before_it_says_so(pool, fake_nccl, two_gpus):
    before = fake_nccl.fake_nccl_count(b"operations")
    accepted, connected = auto_pair(pool, two_gpus)
    assert (accepted.kind, connected.kind) == ("nccl", "nccl"), connected.reason
    assert fake_nccl.fake_nccl_count(b"operations") - before == 4  # both ways at either end
    exchange(accepted, connected)
    assert not DeviceTurn("cuda:0").holder
    assert not DeviceTurn("cuda:1").holder


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("setting", [b"fail_init_rank", b"fail_first_rank"])
def test_nccl_that_fails_at_one_end_is_left_by_both(pool, fake_nccl, two_gpus, setting, rank):
    """NCCL fails at one end at a time, and often only when it connects for the first transfer."""
    fake_nccl.fake_nccl_set(setting, rank)
    accepted, connected = auto_pair(pool, two_gpus)
    assert accepted.kind == connected.kind == "shm"
    assert "nccl could not be set up" in connected.reason
    assert "nccl could not be set up" in accepted.reason
    # The end that had to wait did not wait for its deadline.
    assert "has gone" in (accepted if rank == 1 else connected).reason
    exchange(accepted, connected)


@pytest.mark.parametrize("setting", [b"stall_init", b"stall"])
def test_nccl_that_hangs_leaves_time_for_the_host(pool, fake_nccl, two_gpus, setting):
    fake_nccl.fake_nccl_set(setting, 1)
    accepted, connected = auto_pair(pool, two_gpus, timeout=5.0)
    assert accepted.kind == connected.kind == "shm"
    assert "nccl could not be set up" in connected.reason
    exchange(accepted, connected)


def test_a_turn_that_is_never_free_leaves_nccl_out(pool, two_gpus):
    with DeviceTurn("cuda:1", holder="an engine that hangs"):
        accepted, connected = auto_pair(pool, two_gpus, timeout=3.0)
    assert accepted.kind == connected.kind == "shm"
    assert "an engine that hangs" in accepted.reason  # whichever end was tired of it first
    assert "an engine that hangs" in connected.reason


def test_a_connection_that_is_made_again_leaves_nccl_out(pool, fake_nccl, two_gpus):
    before = fake_nccl.fake_nccl_count(b"made")
    accepted, connected = pair(
        pool, "auto", device=two_gpus[0], listener_device=two_gpus[1], again=True
    )
    assert accepted.kind == connected.kind == "shm"
    assert "is being made again" in accepted.reason
    accepted, connected = pair(
        pool, "nccl", device=two_gpus[0], listener_device=two_gpus[1], again=True
    )
    assert accepted.kind == connected.kind == "tcp"
    assert fake_nccl.fake_nccl_count(b"made") == before


def test_nccl_does_not_listen_where_nobody_told_it_to(fake_nccl, two_gpus, monkeypatch):
    """NCCL's own sockets are not bound to the listener's address."""

    def offered(kind, host):
        with PatchListener(kind, key=KEY, host=host, device=two_gpus[1]) as listener:
            return listener._abilities.nccl

    assert offered("auto", "127.0.0.1") == 23004  # NCCL_SOCKET_IFNAME=lo
    for names in ("", "eth0", "lo,eth0", "^eth0"):
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", names)
        assert offered("auto", "127.0.0.1") == 0
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    assert offered("auto", "127.0.0.1") == 0
    assert offered("auto", "0.0.0.0") == 23004
    assert offered("nccl", "127.0.0.1") == 23004


def test_nccl_that_was_told_to_block_is_refused(fake_nccl, monkeypatch):
    for value, refused in (("1", True), ("0", False)):
        monkeypatch.setenv("NCCL_COMM_BLOCKING", value)
        assert ("NCCL_COMM_BLOCKING" in nccl_probe().problem) == refused


def test_python_goes_on_while_nccl_lets_go(fake_nccl):
    """Whoever drops the last reference waits for NCCL, and waits alone."""
    comm = _core.NcclComm(
        paths.nccl_candidates(),
        open_device("cpu"),
        _core.nccl_unique_id(paths.nccl_candidates()),
        0,
        1,
        SECONDS,
    )
    aborting = fake_nccl.fake_nccl_count(b"aborting")
    went_on = threading.Event()
    fake_nccl.fake_nccl_set(b"hold_abort", 1)

    def other():
        while fake_nccl.fake_nccl_count(b"aborting") == aborting:
            pass
        went_on.set()
        fake_nccl.fake_nccl_set(b"hold_abort", 0)

    thread = threading.Thread(target=other)
    thread.start()
    # From here on a thread lets others run only where it says so.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        del comm
        assert went_on.is_set()
    finally:
        sys.setswitchinterval(interval)
        thread.join()
