"""Patches from GPU to GPU by P2P and by NCCL, in one process and between two."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_memory import PAGE, FakeGpu, Gpu, RealGpu

sys.path.insert(0, str(Path(__file__).parents[1] / "migration"))
from migration_cases import KEY, SECONDS, Running, ranges

from pipelive_kv import _core
from pipelive_kv.kv import KVPool
from pipelive_kv.memory import PagePool
from pipelive_kv.migration import PatchReceiver, PatchSender
from pipelive_kv.spec import KVSpec
from pipelive_kv.transport import Channel, PatchListener, abilities, connect, nccl_probe, paths
from pipelive_kv.transport.handshake import HelloMismatchError

LAYERS = (1, 4)
BLOCKS = 48
SPEC = KVSpec(2, 64, block_size=16)
OTHER = KVSpec(2, 64, block_size=16, order="nhd")
ALL = ranges((0, BLOCKS * 16))


def pool_on(pages: PagePool, spec: KVSpec) -> KVPool:
    return KVPool(
        spec, num_layers=6, layers=LAYERS, max_blocks=BLOCKS, capacity=BLOCKS, page_pool=pages
    )


def views(pool: KVPool) -> dict[int, Any]:
    return {layer: pool.layer(layer) for layer in LAYERS}


@contextmanager
def connected(want: str, near: Any, far: Any) -> Iterator[tuple[Channel, Channel]]:
    """Both ends of a channel over a socket pair, the source's first."""
    a, b = socket.socketpair()
    source = abilities.abilities(near, "auto" if want == "p2p" else want)
    target = abilities.abilities(far, want)
    ends_at = time.monotonic() + SECONDS
    memory = _core.shm_memory(16 << 20)
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(paths.set_up_target, b, far, target, source, "shm", ends_at)
        own = paths.set_up_source(a, near, source, target, "shm", ends_at)
        taking = other.result()
        near_channel = Channel(own.channel(_core.shm_channel(a.detach(), os.dup(memory), 0)))
        far_channel = Channel(taking.channel(_core.shm_channel(b.detach(), memory, 1)))
    assert near_channel.kind == far_channel.kind == want
    yield near_channel, far_channel
    near_channel.close()
    far_channel.close()


def session(gpu: Gpu, want: str, pages: PagePool) -> None:
    with (
        connected(want, gpu.device, pages.device) as (near, far),
        gpu.pool(SPEC, num_layers=6, layers=LAYERS, max_blocks=BLOCKS, capacity=BLOCKS) as source,
        pool_on(pages, OTHER) as target,
    ):
        for layer in LAYERS:
            gpu.fill(source, layer, layer)
        receiver = PatchReceiver(far, OTHER, views(target), epoch=3)
        with Running(receiver) as running:
            sender = PatchSender(near, SPEC, views(source), epoch=3, max_message_bytes=1 << 16)
            before = near.stats()["bytes_sent"]
            stats = sender.send_round(0, 0, ALL, timeout=SECONDS)
            assert stats.messages > 4
            assert near.stats()["bytes_sent"] - before >= stats.slots * SPEC.slot_bytes
            sender.wait_applied(0, SECONDS)
            assert sender.verify(ALL, SECONDS)
            some = ranges((3, 20), (100, 1), (333, 77))
            for layer in LAYERS:
                gpu.fill(source, layer, 10 + layer)
            sender.send_round(1, 1, some, timeout=SECONDS)
            sender.wait_applied(1, SECONDS)
            assert sender.verify(some, SECONDS)
            sender.finish(SECONDS)
            assert running.join() is None
        for layer in LAYERS:
            new = gpu.layer(source, layer).transpose(0, 3, 1, 2, 4).reshape(BLOCKS * 16, -1)
            got = gpu.layer(target, layer).transpose(0, 3, 1, 2, 4).reshape(BLOCKS * 16, -1)
            same = (new == got).all(axis=1)
            for begin, count in some.tolist():
                assert same[begin : begin + count].all()
            assert not same[200:300].any()


def test_p2p_within_one_gpu(gpu: Gpu) -> None:
    session(gpu, "p2p", gpu.pages)


def test_p2p_between_two_gpus(gpu: Gpu) -> None:
    session(gpu, "p2p", second_pages(gpu))


@pytest.mark.parametrize("gpu", ["fake"], indirect=True)
@pytest.mark.parametrize("nccl", [False, True])
def test_mapped_memory_that_reads_as_other_bytes_is_not_taken(
    gpu: Gpu, nccl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``auto`` both ends go on by what comes next; where P2P was asked for they refuse."""
    assert isinstance(gpu, FakeGpu)
    far = second_pages(gpu).device
    gpu.cuda.library.fake_driver_import_other(1)
    if nccl:
        use_fake_nccl(gpu, monkeypatch)
    for want in ("auto", "p2p"):
        a, b = socket.socketpair()
        source = abilities.abilities(gpu.device, "auto")
        target = abilities.abilities(far, want)
        ends_at = time.monotonic() + SECONDS
        with a, b, ThreadPoolExecutor(1) as threads:
            other = threads.submit(paths.set_up_target, b, far, target, source, "shm", ends_at)
            if want == "p2p":
                with pytest.raises(HelloMismatchError, match=r"p2p was asked for.*other bytes"):
                    paths.set_up_source(a, gpu.device, source, target, "shm", ends_at)
                with pytest.raises(HelloMismatchError, match=r"p2p was asked for.*other bytes"):
                    other.result()
            else:
                own = paths.set_up_source(a, gpu.device, source, target, "shm", ends_at)
                taken = other.result()
                assert own.path == taken.path == ("nccl" if nccl else "host")
                assert "reads as other bytes than it holds" in own.why
                assert "reads as other bytes than it holds" in taken.why
                for end in (own, taken):
                    assert end.peer is None
                    if end.comm is not None:
                        end.comm.abort()
                del own, taken, end
            del other


@pytest.mark.parametrize("want", ["p2p"])
def test_weights_go_beside_their_messages(gpu: Gpu, want: str) -> None:
    numbers = np.random.default_rng(5).integers(0, 1 << 15, 70000).astype(np.int16)
    weights = gpu.put(numbers, "int16")
    place = gpu.put(np.zeros_like(numbers), "int16")
    with (
        connected(want, gpu.device, gpu.device) as (near, far),
        gpu.pool(SPEC, num_layers=6, layers=LAYERS, max_blocks=BLOCKS, capacity=BLOCKS) as source,
        pool_on(gpu.pages, SPEC) as target,
    ):
        receiver = PatchReceiver(far, SPEC, views(target), epoch=1, regions={9: place})
        with Running(receiver):
            sender = PatchSender(near, SPEC, views(source), epoch=1)
            sender.send_region(9, weights, SECONDS)
            receiver.wait_region(9, SECONDS)
            sender.finish(SECONDS)
    address = place.data_ptr() if callable(place.data_ptr) else place.data_ptr
    assert gpu.bytes_of(address, numbers.nbytes) == numbers.tobytes()


def second_pages(gpu: Gpu) -> PagePool:
    if isinstance(gpu, FakeGpu):
        gpu.cuda.library.fake_driver_devices(2)
        return PagePool(256 << 20, page_bytes=PAGE, device=gpu.cuda.device(1))
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, there is one")
    return PagePool(256 << 20, page_bytes=PAGE, device=_core.CudaDevice(1))


def use_fake_nccl(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    path = str(Path(gpu.cuda.path).with_name("libpipelive_fake_nccl.so"))
    for module in ("paths", "nccl"):
        monkeypatch.setattr(f"pipelive_kv.transport.{module}.nccl_candidates", lambda: [path])
    # The fake's two GPUs say the same of themselves.
    monkeypatch.setattr(
        abilities, "_no_nccl", lambda *_: "" if nccl_probe().version else "no fake NCCL"
    )
    return ctypes.CDLL(path)


def test_nccl_between_two_gpus(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    library = None
    if isinstance(gpu, FakeGpu):
        library = use_fake_nccl(gpu, monkeypatch)
    elif nccl_probe().problem:
        pytest.skip(f"no NCCL: {nccl_probe().problem}")
    session(gpu, "nccl", second_pages(gpu))
    if library is not None:
        assert library.fake_nccl_count(b"violations") == 0


@pytest.mark.gpu
def test_nccl_with_itself_on_a_gpu() -> None:
    torch = pytest.importorskip("torch")
    if nccl_probe().problem:
        pytest.skip(f"no NCCL: {nccl_probe().problem}")
    device = _core.CudaDevice(0)
    identity = _core.nccl_unique_id(paths.nccl_candidates())
    comm = _core.NcclComm(paths.nccl_candidates(), device, identity, 0, 1, 60.0)
    out = torch.randint(0, 255, (3_000_001,), dtype=torch.uint8, device="cuda")
    into = torch.zeros_like(out)
    torch.cuda.synchronize()
    for _ in range(3):
        comm.exchange(out.data_ptr(), into.data_ptr(), out.numel(), 0, 30.0)
    assert torch.equal(out, into)
    comm.abort()


# -- two processes ---------------------------------------------------------------------------------


def between_processes(gpu: Gpu, kind: str, expected: str, **environment: str) -> None:
    real = "real" if isinstance(gpu, RealGpu) else "fake"
    listener = PatchListener(kind, key=KEY, hello={"epoch": 3}, device=gpu.device)
    child = subprocess.Popen(
        [sys.executable, __file__, real, listener.address],
        env={
            **os.environ,
            **environment,
            "PYTHONPATH": os.pathsep.join([*(p for p in sys.path if p), os.getcwd()]),
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        with (
            listener,
            gpu.pool(
                OTHER, num_layers=6, layers=LAYERS, max_blocks=BLOCKS, capacity=BLOCKS
            ) as target,
        ):
            channel = listener.accept(120)
            assert channel.kind == expected, channel.reason
            receiver = PatchReceiver(channel, OTHER, views(target), epoch=3)
            receiver.run(120)
            assert receiver.stats().rounds == 20
        out, _ = child.communicate(timeout=SECONDS)
        assert out.strip() == f"{expected} same"
    finally:
        child.kill()
        child.wait()


def test_p2p_between_two_processes(gpu: Gpu) -> None:
    between_processes(gpu, "p2p", "p2p")


def test_auto_takes_p2p_on_one_gpu(gpu: Gpu) -> None:
    between_processes(gpu, "auto", "p2p")


@pytest.mark.gpu
def test_nccl_between_two_processes_on_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = nccl_probe()
    if not probe.multi_rank_gpu:
        pytest.skip(f"two ranks on one GPU need NCCL 2.30, there is {probe.version or 'none'}")
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    between_processes(RealGpu(), "nccl", "nccl", NCCL_MULTI_RANK_GPU_ENABLE="1")


def main(kind: str, address: str) -> None:
    gpu = RealGpu() if kind == "real" else FakeGpu()
    with gpu.pool(SPEC, num_layers=6, layers=LAYERS, max_blocks=BLOCKS, capacity=BLOCKS) as source:
        channel = connect(address, key=KEY, timeout=100, hello={"epoch": 3}, device=gpu.device)
        for layer in LAYERS:
            gpu.fill(source, layer, layer)
        sender = PatchSender(channel, SPEC, views(source), epoch=3)
        for number in range(20):
            sender.send_round(number, number, ALL, timeout=SECONDS)
        sender.wait_applied(19, SECONDS)
        same = sender.verify(ALL, SECONDS)
        sender.finish(SECONDS)
    print(channel.kind, "same" if same else "different", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
