"""Which way payloads take, and how P2P is set up, over plain memory."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import socket
import struct
from dataclasses import replace

import pytest
from tests.transport.ends import KEY, SECONDS, exchange, pair, soon

from pipelive_kv import _core
from pipelive_kv.errors import ClosedError, DeadlineError, InvalidArgumentError, ProtocolError
from pipelive_kv.memory import open_device
from pipelive_kv.transport import (
    PatchListener,
    paths,
)
from pipelive_kv.transport.abilities import Abilities, choose

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
                paths.set_up_target(own, device, host, host, "shm", soon())
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
            paths.set_up_target(own, open_device("cpu"), host, host, "shm", soon())


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
        setup = paths.set_up_target(own, open_device("cpu"), host, host, "shm", soon())
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
            paths.set_up_target(own, open_device("cpu"), host, host, "shm", soon())
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
            paths.set_up_target(own, open_device("cpu"), host, host, "shm", soon())
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_peer_that_says_nothing_is_a_deadline():
    own, peer = socket.socketpair()
    host = Abilities("p2p", "cpu", "", True)
    with own, peer, pytest.raises(DeadlineError, match="setting up the path"):
        paths.set_up_target(own, open_device("cpu"), host, host, "shm", soon(0.05))


def test_both_ends_fall_back_together(pool):
    """With ``auto``, a target that cannot map the staging says so, and both go on by the host."""
    own, peer = socket.socketpair()
    gpu = replace(GPU, nccl=0)
    with own, peer:
        source = pool.submit(paths.set_up_source, peer, open_device("cpu"), gpu, gpu, "shm", soon())
        broken = _core.FaultDevice(open_device("cpu"))
        broken.fail("import_pages", 1)
        target = paths.set_up_target(own, broken, gpu, gpu, "shm", soon())
        assert source.result().path == target.path == "host"
        assert "cannot use it" in target.why
        assert "cannot use it" in source.result().why
