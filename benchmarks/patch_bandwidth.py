"""Bandwidth of patches between two processes, against plain copies of the same run.

One thread of the source packs slots into messages, one thread of the target unpacks them. So every
byte is copied once by each of two threads that run at the same time (over TCP the kernel copies
twice more), and the limit is what two threads copy at the same time, each its own bytes: at best a
patch goes as fast as the slower of the two. Three kinds of ranges: whole blocks that lie together,
and single slots far apart in both orders of a block.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import numpy.typing as npt

import pipelive_kv as pk
from common import MIB, SPREAD_HEAD, Figure, Result, Spread, Table, finish, number, parser
from pipelive_kv.migration import PatchReceiver, PatchSender
from pipelive_kv.transport import PatchListener, connect

LAYERS = 4
TIMEOUT = 120.0


@dataclass(frozen=True)
class Case:
    """One way to send."""

    transport: str
    pattern: str
    order: str
    checksum: bool


def pool_of(order: str, blocks: int) -> pk.KVPool:
    """A pool whose pages have all been written to."""
    spec = pk.KVSpec(8, 128, "bfloat16", 16, order)
    pool = pk.KVPool(
        spec, num_layers=LAYERS, layers=range(LAYERS), max_blocks=blocks, capacity=blocks
    )
    for layer in range(LAYERS):
        pool.layer(layer).as_uint16()[:] = layer + 1
    return pool


def receive(order: str, blocks: int, transport: str, key: bytes, pipe: Connection) -> None:
    """The target process: applies one session after the other, told epochs and checksums."""
    with pool_of(order, blocks) as pool, PatchListener(transport, key=key) as listener:
        pipe.send_bytes(listener.address.encode())
        layers = {layer: pool.layer(layer) for layer in range(LAYERS)}
        while word := pipe.recv_bytes():
            with listener.accept(TIMEOUT) as channel:
                PatchReceiver(channel, pool.spec, layers, epoch=int(word)).run(TIMEOUT)


def ranges_of(pattern: str, blocks: int, seed: int) -> npt.NDArray[np.uint64]:
    """All blocks as one range, or a random slot of every block; ascending as a collect is."""
    if pattern == "contiguous":
        return np.array([[0, blocks * 16]], dtype=np.uint64)
    slots = np.arange(blocks) * 16 + np.random.default_rng(seed).integers(0, 16, blocks)
    return np.stack([slots, np.ones(blocks)], axis=1).astype(np.uint64)


def measure(
    order: str, transport: str, blocks: int, arguments: argparse.Namespace
) -> dict[Case, list[float]]:
    """Bytes of KV per second of every round, from its start until it is applied."""
    key, context = secrets.token_bytes(32), multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(
        target=receive, args=(order, blocks, transport, key, theirs), daemon=True
    )
    process.start()
    theirs.close()
    found: dict[Case, list[float]] = {}
    try:
        with pool_of(order, blocks) as pool:
            address = pipe.recv_bytes().decode()
            layers = {layer: pool.layer(layer) for layer in range(LAYERS)}
            patterns = ("contiguous", "single slots") if order == "hnd" else ("single slots",)
            for epoch, case in enumerate(
                (Case(transport, pattern, order, checksum)
                 for pattern in patterns for checksum in (True, False)), 1,
            ):  # fmt: skip
                pipe.send_bytes(str(epoch).encode())
                channel = connect(address, key=key, timeout=TIMEOUT)
                sender = PatchSender(
                    channel, pool.spec, layers, epoch=epoch, checksum=case.checksum
                )
                ranges = ranges_of(case.pattern, blocks, arguments.seed)
                size = int(ranges[:, 1].sum()) * pool.spec.slot_bytes * LAYERS
                rates = []
                for number_ in range(arguments.rounds + 1):
                    begin = time.perf_counter()
                    sender.send_round(number_, number_, ranges, timeout=TIMEOUT)
                    sender.wait_applied(number_, TIMEOUT)
                    rates.append(size / (time.perf_counter() - begin))
                sender.finish(TIMEOUT)
                channel.close()
                found[case] = rates[1:]  # the first one also finds the buffers cold
            pipe.send_bytes(b"")
    finally:
        process.join(10)
        process.kill()
        process.join()
    return found


def together(threads: int, size: int, rounds: int, work: Callable[[int], None]) -> list[float]:
    """Bytes per second of each of ``threads`` threads that do ``work(thread)`` at one time."""
    rates = []
    for _ in range(rounds + 1):
        others = [threading.Thread(target=work, args=(i,)) for i in range(1, threads)]
        begin = time.perf_counter()
        for thread in others:
            thread.start()
        work(0)
        for thread in others:
            thread.join()
        rates.append(size / (time.perf_counter() - begin))
    return rates[1:]


def copies(blocks: int, threads: int, rounds: int) -> list[float]:
    """memcpy within a pool's memory, a layer to another; each thread copies its own."""
    with pool_of("hnd", blocks) as pool:
        size = blocks * pool.spec.block_bytes
        at = [pool.layer(layer).data_ptr for layer in range(LAYERS)]

        def work(thread: int) -> None:
            ctypes.memmove(at[2 * thread + 1], at[2 * thread], size)

        return together(threads, size, rounds, work)


def gathers(run: int, blocks: int, threads: int, rounds: int, seed: int) -> list[float]:
    """Runs from random places of a pool's memory into a 1 MiB buffer, over and over."""
    with pool_of("hnd", blocks) as pool:
        size = blocks * pool.spec.block_bytes
        orders, sources = [], []
        for thread in range(threads):
            memory = (ctypes.c_byte * size).from_address(pool.layer(thread).data_ptr)
            sources.append(np.frombuffer(memory, dtype=f"V{run}"))
            order = np.random.default_rng(seed + thread).permutation(size // run)
            orders.append(order[: max(1, len(order) // 4)])
        buffers = [np.empty(max(1, MIB // run), dtype=f"V{run}") for _ in range(threads)]

        def work(thread: int) -> None:
            order, buffer = orders[thread], buffers[thread]
            for start in range(0, len(order), len(buffer)):
                part = order[start : start + len(buffer)]
                np.take(sources[thread], part, out=buffer[: len(part)], mode="clip")

        return together(threads, len(orders[0]) * run, rounds, work)


def evaluate(found: dict[Case, list[float]], limits: dict[str, list[float]]) -> Result:
    """Tables and figures."""
    result = Result("patch_bandwidth")
    run = {"hnd": 256, "nhd": 2048}
    rows = []
    for case, rates in found.items():
        limit = (
            "memcpy, two at once"
            if case.pattern == "contiguous"
            else f"gather of {run[case.order]} B, two at once"
        )
        rate, most = Spread.of(rates), Spread.of(limits[limit])
        share = rate.p50 / most.p50
        pattern = case.pattern
        if case.pattern != "contiguous":
            pattern += f", {case.order}, runs of {run[case.order]} B"
        rows.append([
            case.transport, pattern, "on" if case.checksum else "off",
            *Spread.of(rates).cells(1e-9), number(share),
        ])  # fmt: skip
        if case.transport == "shm":
            wanted = case.pattern == "contiguous" and case.checksum
            plain = case.pattern == "contiguous"
            result.figures.append(Figure(
                f"patch bandwidth over shared memory, {pattern}, checksum "
                f"{'on' if case.checksum else 'off'}: share of {limit}",
                share, "", "at least 0.7" if plain else "",
                f"{limit}: {number(most.p50 / 1e9)} GB/s each",
                share >= 0.7 if plain else None,
                f"{number(rate.p50 / 1e9)} GB/s, best {number(rate.max / 1e9)}"
                + ("" if wanted or plain else ""),
            ))  # fmt: skip
    result.tables.append(Table(
        "Patches, GB/s of KV", ("transport", "ranges", "checksum", *SPREAD_HEAD, "share of limit"),
        rows, "From the start of a round to the target's word that it is applied.",
    ))  # fmt: skip
    result.tables.append(Table(
        "Limits in the same run, GB/s of each thread", ("limit", *SPREAD_HEAD),
        [[name, *Spread.of(rates).cells(1e-9)] for name, rates in limits.items()],
        "Within the same kind of memory as the pool's (a memory file in pages of 4 KiB).",
    ))  # fmt: skip
    result.data = {
        "patches": {
            f"{c.transport}/{c.pattern}/{c.order}/{'crc' if c.checksum else 'plain'}": rates
            for c, rates in found.items()
        },
        "limits": limits,
    }
    return result


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--mib", type=int, default=256, help="of KV in a round of whole blocks")
    made.add_argument("--rounds", type=int, default=9, help="that are timed, after one that is not")
    made.add_argument("--transports", nargs="+", default=["shm", "tcp"], choices=("shm", "tcp"))
    arguments = made.parse_args()
    started = time.monotonic()
    blocks = arguments.mib * MIB // (LAYERS * 64 * 1024)
    rounds, seed = arguments.rounds, arguments.seed
    limits: dict[str, list[float]] = {}

    def measure_limits() -> None:
        for threads, words in ((1, "alone"), (2, "two at once")):
            limits.setdefault(f"memcpy, {words}", []).extend(copies(blocks, threads, rounds))
            for run in (256, 2048):
                limits.setdefault(f"gather of {run} B, {words}", []).extend(
                    gathers(run, blocks, threads, rounds, seed)
                )

    # Before and after, since a shared machine changes its pace.
    measure_limits()
    found: dict[Case, list[float]] = {}
    for transport in arguments.transports:
        for order in ("hnd", "nhd"):
            found |= measure(order, transport, blocks, arguments)
    measure_limits()
    finish(evaluate(found, limits), arguments, started)


if __name__ == "__main__":
    main()
