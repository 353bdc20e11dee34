"""Patches between two processes on one GPU (P2P), and NCCL with itself, beside a plain copy.

Needs torch with CUDA and ``PYTHONPATH=src``; neither msgspec nor pyzmq. Every limit is measured in
the same run. On one GPU a patch reads and writes everything twice (slots to staging, staging to
slots), so half of a plain copy is what it could reach with staging in memory; pieces that stay in
the L2 cache can do better.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

SOURCES = Path(__file__).resolve().parents[2] / "src"
if importlib.util.find_spec("msgspec") is None or importlib.util.find_spec("zmq") is None:
    # The package without its __init__, which imports the control plane.
    bare = types.ModuleType("pipelive_kv")
    bare.__path__ = [str(SOURCES / "pipelive_kv")]
    sys.modules["pipelive_kv"] = bare
sys.path.insert(0, str(SOURCES))

from pipelive_kv import _core  # noqa: E402
from pipelive_kv.kv import KVPool  # noqa: E402
from pipelive_kv.memory import open_device  # noqa: E402
from pipelive_kv.spec import KVSpec  # noqa: E402
from timing import gpu_seconds, random_bytes  # noqa: E402

MIB = 1 << 20
SECONDS = 60.0
SPEC = KVSpec(8, 128, "bfloat16", 16)


def make_pool(layers: int, blocks: int, device: str) -> KVPool:
    return KVPool(
        SPEC,
        num_layers=layers,
        layers=range(layers),
        max_blocks=blocks,
        capacity=blocks,
        budget=40 << 30,
        device=device,
    )


def slot_ranges(kind: str, blocks: int) -> np.ndarray[Any, Any]:
    """About half of the slots that there are, never those of block 0."""
    block = SPEC.block_size
    random = np.random.default_rng(7)
    if kind == "one range":
        return np.array([[block, blocks // 2 * block]], dtype=np.uint64)
    chosen = np.sort(random.permutation(np.arange(1, blocks))[: blocks // 2])
    if kind == "whole blocks":
        return np.stack([chosen * block, np.full_like(chosen, block)], 1).astype(np.uint64)
    # Half a block each, from twice as many blocks: what a few decode steps leave behind.
    every = np.arange(1, blocks)
    begins = every * block + random.integers(0, block // 2, every.size)
    return np.stack([begins, np.full_like(begins, block // 2)], 1).astype(np.uint64)


def plain_copy(nbytes: int, device: str) -> float:
    """Seconds to copy ``nbytes`` on the device."""
    source = random_bytes(nbytes, device)
    target = torch.zeros_like(source)
    times = []
    for _ in range(12):
        if device == "cpu":
            start = time.perf_counter()
            target.copy_(source)
            times.append(time.perf_counter() - start)
            continue
        times.append(gpu_seconds(partial(target.copy_, source)))
    del source, target
    torch.cuda.empty_cache()
    return statistics.median(times[2:])


def nccl_library() -> list[str]:
    found = []
    for package in ("nvidia.nccl", "torch"):
        try:
            spec = importlib.util.find_spec(package)
        except ImportError:
            continue
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            path = Path(folder) / "lib" / "libnccl.so.2"
            if path.is_file():
                found.append(str(path))
    return [*found, "libnccl.so.2"]


def nccl_alone(nbytes: int) -> tuple[str, float]:
    """The version, and the seconds of a send to and receive from itself."""
    candidates = nccl_library()
    _, version, _, _, _, problem = _core.nccl_probe(candidates)
    if problem:
        return f"none: {problem[:200]}", float("nan")
    device = open_device("cuda:0")
    staging = _core.Staging(device, nbytes, 2)
    identity = _core.nccl_unique_id(candidates)
    comm = _core.NcclComm(candidates, device, identity, 0, 1, SECONDS)
    filling = random_bytes(nbytes)
    torch.cuda.synchronize()
    comm.exchange(filling.data_ptr(), staging.piece(0), nbytes, 0, SECONDS)
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        comm.exchange(staging.piece(0), staging.piece(1), nbytes, 0, SECONDS)
        times.append(time.perf_counter() - begin)
    comm.abort()
    return version, statistics.median(times[3:])


def open_end(connected: socket.socket, memory: int, side: int, **ends: Any) -> Any:
    base = _core.shm_channel(connected.detach(), memory, side)
    return _core.p2p_channel(base, ends["device"], ends.get("own"), ends.get("peer"))


def run_source(fd: int, settings: dict[str, Any]) -> None:
    """The child: sends rounds, prints the seconds of each."""
    connected = socket.socket(fileno=fd)
    pool = make_pool(settings["layers"], settings["blocks"], settings["device"])
    device = pool.page_pool.device
    staging = _core.Staging(device, settings["piece_bytes"], settings["pieces"])
    exported, offset, nbytes = staging.export_memory()
    shape = {
        "offset": offset,
        "nbytes": nbytes,
        "piece_bytes": staging.piece_bytes,
        "pieces": staging.pieces,
    }
    memory = _core.shm_memory(16 * MIB)
    socket.send_fds(connected, [json.dumps(shape).encode()], [exported, memory])
    os.close(exported)
    assert connected.recv(1) == b"r"
    channel = open_end(connected, memory, 0, device=device, own=staging)
    views = {layer: pool.layer(layer) for layer in range(settings["layers"])}
    for view in views.values():
        torch.from_dlpack(view).normal_()
    if settings["device"] != "cpu":
        torch.cuda.synchronize()
    checksum = settings["checksum"]
    most = staging.piece_bytes
    sender = _core.PatchSender(channel, SPEC.core, views, 1, most, 0.0, checksum)
    ranges = slot_ranges(settings["kind"], settings["blocks"])
    seconds = []
    sent = 0
    for number in range(settings["rounds"]):
        begin = time.perf_counter()
        stats = sender.send_round(number, number, ranges, [], SECONDS)
        sender.wait_applied(number, SECONDS)
        seconds.append(time.perf_counter() - begin)
        sent = stats[3] * SPEC.slot_bytes
    sender.verify(ranges[:64], SECONDS)
    sender.finish(SECONDS)
    print(json.dumps({"seconds": seconds, "bytes": sent}), flush=True)


def patch(settings: dict[str, Any]) -> tuple[float, int, bool]:
    """Seconds of a round between two processes (the median), and the bytes it carried.

    Last whether the source's staging could be written here, as not every driver maps read-only.
    """
    ours, theirs = socket.socketpair()
    child = subprocess.Popen(
        [sys.executable, __file__, "--source", str(theirs.fileno()), json.dumps(settings)],
        pass_fds=[theirs.fileno()],
        stdout=subprocess.PIPE,
        text=True,
    )
    theirs.close()
    pool = make_pool(settings["layers"], settings["blocks"], settings["device"])
    device = pool.page_pool.device
    ours.settimeout(SECONDS)
    said, fds, _, _ = socket.recv_fds(ours, 4096, 2)
    shape = json.loads(said)
    peer = _core.PeerStaging(
        device, fds[0], *(shape[n] for n in ("offset", "nbytes", "piece_bytes", "pieces"))
    )
    ours.sendall(b"r")
    channel = open_end(ours, fds[1], 1, device=device, peer=peer)
    views = {layer: pool.layer(layer) for layer in range(settings["layers"])}
    receiver = _core.PatchReceiver(channel, SPEC.core, views, 1, {}, None)
    receiver.run(SECONDS * 4, None)
    told = json.loads(child.communicate(timeout=SECONDS)[0])
    channel.close()
    pool.close()
    return statistics.median(told["seconds"][1:]), told["bytes"], peer.writable


class Report:
    """Prints every row when it is there and keeps the file up to date: a run may be cut short."""

    def __init__(self, device: str, path: Path | None) -> None:
        self.device = device
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.staging = ""

    def add(self, what: str, seconds: float, nbytes: int, copy: float) -> None:
        """``copy``: the seconds that a plain copy of as many bytes takes."""
        rate = nbytes / seconds * 1e-9
        row = {"what": what, "seconds": seconds, "gb_s": rate, "ratio": copy / seconds}
        self.rows.append(row)
        print(
            f"{what:52s} {seconds * 1e3:9.3f} ms {rate:8.1f} GB/s {row['ratio']:6.2f}", flush=True
        )
        if self.path is not None:
            document = {"device": self.device, "staging": self.staging, "rows": self.rows}
            self.path.write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", nargs=2, metavar=("FD", "SETTINGS"), help=argparse.SUPPRESS)
    parser.add_argument("--mib", type=int, default=1024, help="bytes of a patch")
    parser.add_argument("--device", default="cuda:0", help="cpu tries the whole path without a GPU")
    parser.add_argument("--quick", action="store_true", help="one shape and one piece size")
    parser.add_argument("--json", "--out", type=Path, dest="json", help="keep the figures here too")
    options = parser.parse_args()
    if options.source:
        run_source(int(options.source[0]), json.loads(options.source[1]))
        return
    nbytes = options.mib * MIB
    layers = 16
    blocks = 2 * nbytes // (layers * SPEC.slot_bytes * SPEC.block_size)
    name = "cpu" if options.device == "cpu" else torch.cuda.get_device_name(0)
    print(
        f"{name}: {options.mib} MiB of slots, ratios to a plain copy of as many bytes", flush=True
    )
    report = Report(name, options.json)
    copy = plain_copy(nbytes, options.device)
    report.add("plain copy", copy, nbytes, copy)
    kinds = ["one range"] if options.quick else ["one range", "whole blocks", "half blocks"]
    sizes = [32] if options.quick else [8, 32, 128]
    for kind in kinds:
        for piece in sizes:
            for checksum in (False, True):
                settings = {
                    "layers": layers,
                    "blocks": blocks,
                    "kind": kind,
                    "piece_bytes": piece * MIB,
                    "pieces": 3,
                    "checksum": checksum,
                    "rounds": 8,
                    "device": options.device,
                }
                seconds, sent, writable = patch(settings)
                report.staging = "mapped writable" if writable else "mapped read-only"
                what = f"P2P, {kind}, pieces of {piece} MiB" + (", checksum" if checksum else "")
                report.add(what, seconds, sent, copy * sent / nbytes)
    print(f"the source's staging is {report.staging}", flush=True)
    if options.device != "cpu":
        version, seconds = nccl_alone(64 * MIB)
        what = f"NCCL {version} with itself, 64 MiB"
        report.add(what, seconds, 64 * MIB, plain_copy(64 * MIB, options.device))


if __name__ == "__main__":
    main()
