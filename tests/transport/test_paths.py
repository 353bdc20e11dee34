"""Which way payloads take, and how that is set up, over plain memory and a fake NCCL."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import json
import os
import socket
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from tests.cuda_fake import FakeCuda

from pipelive_kv import _core
from pipelive_kv.errors import ClosedError, DeadlineError, InvalidArgumentError, ProtocolError
from pipelive_kv.memory import open_device
from pipelive_kv.transport import (
    DeviceTurn,
    PatchListener,
    abilities,
    connect,
    nccl_probe,
    paths,
)
from pipelive_kv.transport.abilities import Abilities, choose

KEY = b"0123456789abcdef0123456789abcdef"
SECONDS = 20
GPU = Abilities("auto", "cuda:0", "aa", True, "", 22703, "")
OTHER = replace(GPU, identity="bb")


@pytest.mark.parametrize(
    ("source", "target", "base", "path", "why"),
    [
        (GPU, GPU, "shm", "p2p", "one host"),
        (GPU, OTHER, "shm", "p2p", "one host"),
        (GPU, OTHER, "tcp", "nccl", "Unix socket"),
        (GPU, GPU, "tcp", "host", "2.30"),
        (replace(GPU, p2p=False, p2p_missing="no fds"), OTHER, "shm", "nccl", "no fds"),
        (GPU, replace(OTHER, nccl=0, nccl_missing="not found"), "tcp", "host", "not found"),
        (GPU, replace(OTHER, nccl=22805), "tcp", "host", "22805"),
        (GPU, replace(OTHER, nccl=22707), "tcp", "host", "22707"),
        (replace(GPU, again=True, nccl=0), OTHER, "tcp", "host", "at the source"),
        (replace(GPU, again=True, nccl=0), OTHER, "shm", "p2p", "one host"),
        (
            replace(GPU, again=True, nccl=0),
            replace(OTHER, want="nccl"),
            "tcp",
            "host",
            "is being made again",
        ),
        (Abilities(), GPU, "shm", "host", "source lie in host memory"),
        (GPU, Abilities(), "shm", "host", "target lie in host memory"),
        (GPU, replace(GPU, want="shm"), "shm", "host", "nothing but shm"),
        (GPU, replace(OTHER, want="nccl"), "shm", "nccl", "nothing but nccl"),
    ],
)
def test_the_best_path_that_both_can_take(source, target, base, path, why):
    assert choose(source, target, base)[0] == path
    assert why in choose(source, target, base)[1]


def test_two_ranks_on_one_gpu_need_a_switch_at_both_ends(monkeypatch):
    """What each end was told comes by its hello: an environment is only its own process's."""
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    new = replace(GPU, nccl=23004)
    told = replace(new, multi_rank=True)
    assert choose(told, told, "tcp")[0] == "nccl"
    for source, target, end in ((new, told, "source"), (told, new, "target")):
        path, why = choose(source, target, "tcp")
        assert path == "host"
        assert f"at the {end} NCCL_MULTI_RANK_GPU_ENABLE" in why


@pytest.mark.parametrize("want", ["p2p", "nccl"])
def test_what_was_asked_for_by_name_is_not_replaced(want):
    with pytest.raises(ProtocolError, match=f"{want} was asked for"):
        choose(Abilities(), replace(GPU, want=want), "shm")


def test_a_hello_with_nonsense_is_taken_for_nothing_said():
    said = {**GPU.hello(), "transport.nccl": "many", "transport.p2p": 1}
    assert Abilities.of_hello(said) == replace(GPU, nccl=0, p2p=False)
    assert Abilities.of_hello({}) == Abilities()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as pool:
        yield pool


def pair(pool, kind, *, device=None, timeout=SECONDS, **options):
    listener_device = options.pop("listener_device", device)
    again = options.pop("again", False)
    with PatchListener(kind, key=KEY, device=listener_device, **options) as listener:
        accepted = pool.submit(listener.accept, timeout)
        try:
            connected = connect(
                listener.address, key=KEY, timeout=timeout, device=device, again=again
            )
        except ProtocolError as error:
            return accepted, error
        return accepted.result(), connected


def exchange(accepted, connected):
    for sender, receiver in ((accepted, connected), (connected, accepted)):
        sender.send(b"hello" * 1000, SECONDS)
        assert receiver.receive(SECONDS) == b"hello" * 1000


def test_p2p_between_two_devices_in_plain_memory(pool):
    accepted, connected = pair(
        pool, "p2p", device=open_device("cpu"), listener_device=open_device("cpu")
    )
    assert (accepted.kind, connected.kind) == ("p2p", "p2p")
    assert "nothing but p2p" in connected.reason
    assert "nothing but p2p" in accepted.reason
    assert not accepted.hello
    assert connected.max_bulk_bytes >= 1 << 20
    assert accepted.max_bulk_bytes == 0  # only a source has staging
    exchange(accepted, connected)
    ready = pool.submit(accepted.core.warm_up, False, SECONDS)
    connected.core.warm_up(True, SECONDS)
    ready.result()
    assert accepted.stats()["bytes_received"] > 4096
    connected.close()
    with pytest.raises(ClosedError):
        accepted.receive(SECONDS)


def test_host_memory_goes_by_shared_memory_though_a_device_was_named(pool):
    accepted, connected = pair(pool, "auto", device=open_device("cpu"))
    assert accepted.kind == connected.kind == "shm"
    assert "host memory" in connected.reason


def test_p2p_without_a_device_is_refused_by_name(pool):
    with pytest.raises(InvalidArgumentError, match="needs a device"):
        PatchListener("p2p", key=KEY)
    accepted, error = pair(pool, "p2p", listener_device=open_device("cpu"))
    assert "p2p was asked for" in str(error)
    with pytest.raises(ProtocolError, match="at the source: no device was given"):
        accepted.result()


def test_no_descriptor_is_left_over(pool):
    device = open_device("cpu")
    for end in pair(pool, "p2p", device=device):
        end.close()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        for end in pair(pool, "p2p", device=device):
            end.close()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def frame(content):
    body = json.dumps(content).encode()
    return struct.pack(">I", len(body)) + body


SAMPLE = bytes(range(64))
SHAPE = {
    "ok": True,
    "offset": 0,
    "nbytes": 8192,
    "piece_bytes": 4096,
    "pieces": 2,
    "sample": SAMPLE.hex(),
}


@pytest.mark.parametrize(
    ("said", "fds", "message"),
    [
        (SHAPE, 0, "no descriptor"),
        (SHAPE, 2, "no descriptor"),
        ({**SHAPE, "nbytes": -1}, 1, "no sizes"),
        ({**SHAPE, "pieces": "2"}, 1, "no sizes"),
        ({**SHAPE, "pieces": True}, 1, "no sizes"),
        ({**SHAPE, "pieces": 1 << 32}, 1, "no sizes"),
        ({**SHAPE, "pieces": 3}, 1, "8192 bytes, its pieces 12288"),
        ({**SHAPE, "pieces": 0, "nbytes": 0}, 1, "0 pieces"),
        ({**SHAPE, "piece_bytes": 100, "nbytes": 200}, 1, "multiple of 256"),
        ({**SHAPE, "offset": 1 << 30}, 1, "beyond the file"),
        ({**SHAPE, "sample": None}, 1, "no sample"),
        ({**SHAPE, "sample": "zz" * 64}, 1, "no sample"),
        ({**SHAPE, "sample": "00" * 63}, 1, "no sample"),
        (SHAPE, 1, "reads as other bytes"),
        ({"ok": False, "why": "no memory left"}, 0, "no memory left"),
        ({"ok": True}, 1, "no sizes"),
    ],
)
def test_staging_that_does_not_add_up_is_refused(said, fds, message):
    own, peer = socket.socketpair()
    device = open_device("cpu")
    file = os.memfd_create("staging", os.MFD_ALLOW_SEALING)
    os.ftruncate(file, 8192)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    try:
        with own, peer:
            socket.send_fds(peer, [frame(said)], [file] * fds)
            host = Abilities("p2p", "cpu", "", True)
            with pytest.raises(ProtocolError, match=message):
                paths.set_up_target(own, device, host, host, "shm", _soon())
    finally:
        os.close(file)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        struct.pack(">I", 3) + b"[1]",
        b"\0\0\0\2{]",
        struct.pack(">I", 16000) + b"[" * 16000,
    ],
)
def test_what_is_no_frame_is_refused(data):
    own, peer = socket.socketpair()
    with own, peer:
        peer.sendall(data)
        host = Abilities("p2p", "cpu", "", True)
        with pytest.raises(ProtocolError, match="frame"):
            paths.set_up_target(own, open_device("cpu"), host, host, "shm", _soon())


def test_staging_that_reads_as_its_sample_is_taken():
    own, peer = socket.socketpair()
    file = os.memfd_create("staging", os.MFD_ALLOW_SEALING)
    os.ftruncate(file, 8192)
    for piece in range(2):
        os.pwrite(file, SAMPLE, 4096 * piece)
        os.pwrite(file, SAMPLE, 4096 * (piece + 1) - len(SAMPLE))
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    host = Abilities("p2p", "cpu", "", True)
    with own, peer:
        socket.send_fds(peer, [frame(SHAPE)], [file])
        setup = paths.set_up_target(own, open_device("cpu"), host, host, "shm", _soon())
        assert setup.path == "p2p"
        assert json.loads(peer.recv(4096)[4:]) == {"ok": True}
    os.close(file)


def test_staging_that_could_be_cut_short_is_refused():
    own, peer = socket.socketpair()
    file = os.memfd_create("staging", os.MFD_ALLOW_SEALING)
    os.ftruncate(file, 8192)
    host = Abilities("p2p", "cpu", "", True)
    with own, peer:
        socket.send_fds(peer, [frame(SHAPE)], [file])
        with pytest.raises(ProtocolError, match="cut short"):
            paths.set_up_target(own, open_device("cpu"), host, host, "shm", _soon())
    os.close(file)


def test_more_descriptors_than_anybody_needs_are_refused_and_closed():
    own, peer = socket.socketpair()
    before = len(os.listdir("/proc/self/fd"))
    host = Abilities("p2p", "cpu", "", True)
    with own, peer:
        data = frame(SHAPE)
        for at in range(0, len(data), 4):
            socket.send_fds(peer, [data[at : at + 4]], [peer.fileno()] * 3)
        with pytest.raises(ProtocolError, match="descriptors came"):
            paths.set_up_target(own, open_device("cpu"), host, host, "shm", _soon())
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_peer_that_says_nothing_is_a_deadline():
    own, peer = socket.socketpair()
    host = Abilities("p2p", "cpu", "", True)
    with own, peer, pytest.raises(DeadlineError, match="setting up the path"):
        paths.set_up_target(own, open_device("cpu"), host, host, "shm", _soon(0.05))


def test_both_ends_fall_back_together(pool):
    """With ``auto``, a target that cannot map the staging says so, and both go on by the host."""
    own, peer = socket.socketpair()
    gpu = replace(GPU, nccl=0)
    with own, peer:
        source = pool.submit(
            paths.set_up_source, peer, open_device("cpu"), gpu, gpu, "shm", _soon()
        )
        broken = _core.FaultDevice(open_device("cpu"))
        broken.fail("import_pages", 1)
        target = paths.set_up_target(own, broken, gpu, gpu, "shm", _soon())
        assert source.result().path == target.path == "host"
        assert "cannot map it" in target.why
        assert "cannot map it" in source.result().why


# -- NCCL ----------------------------------------------------------------------------------------


def _soon(seconds=SECONDS):
    return time.monotonic() + seconds


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
    end = _soon()
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
