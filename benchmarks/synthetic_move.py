"""Stop time of a live move of much KV, against stopping the engine while it is copied.

There is no model: two processes, each with a stage and its memory, run steps in which every
sequence writes one token, at a fixed pace. Layers with 256 MiB and 1 GiB of live KV move from one
to the other and back. The stop is what the switchover's step waited, from the moment the driver
wanted it to be stamped: holding, delivery, activation and gates of both stages.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import tempfile
import time
from dataclasses import dataclass, field

import msgspec
import numpy as np

import pipelive_kv as pk
from common import MIB, SPREAD_HEAD, Figure, Result, Spread, Table, finish, number, parser
from synthetic_stage import Message, Shape, run_stage

IN_FLIGHT = 2
KINDS = ("live", "stop_and_copy", "no-op")


@dataclass
class Case:
    """What was measured for one size over one transport, by kind; seconds."""

    shape: Shape
    transport: str
    stops: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    pauses: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    reports: dict[str, list[pk.Report]] = field(default_factory=lambda: {k: [] for k in KINDS})
    ordinary: list[float] = field(default_factory=list)
    verified_slots: int = 0


class Driver:
    """Sends steps at a pace and notes how long each waited."""

    def __init__(self, shape: Shape, transport: str, pace: float, seed: int, record: str) -> None:
        self.shape, self.pace = shape, pace
        key = pk.ControlKey.generate()
        self.coordinator = pk.Coordinator(
            pk.ControlEndpoint("tcp://127.0.0.1:*", key), pp_size=2, record_dir=record
        )
        endpoint = self.coordinator.endpoint
        allocator = pk.BlockAllocator(shape.blocks + 1, shape.blocks + 1)
        self.scheduler = pk.Scheduler(shape.source, allocator=allocator, control=endpoint)
        ids = np.array(allocator.allocate(shape.blocks), dtype=np.int64)
        np.random.default_rng(seed).shuffle(ids)
        self.blocks = ids[: len(ids) // shape.sequences * shape.sequences].reshape(
            shape.sequences, -1
        )
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe(duplex=False) for _ in range(3)]
        control = (endpoint.address, key.to_bytes())
        self.processes = [
            context.Process(
                target=run_stage,
                args=(rank, shape, control, transport, seed, pipes[rank][0], pipes[rank + 1][1]),
                daemon=True,
            )
            for rank in range(2)
        ]
        for process in self.processes:
            process.start()
        self.outbox, self.results = pipes[0][1], pipes[2][0]
        for end in (pipes[0][0], pipes[1][0], pipes[1][1], pipes[2][1]):
            end.close()
        self._decoder = msgspec.msgpack.Decoder(Message)
        self.wanted: dict[int, float] = {}
        self.done: dict[int, float] = {}
        self.steps: dict[int, Message] = {}
        self._next, self._flying = time.monotonic(), 0
        # A stage announces itself once its memory is filled.
        self.coordinator.await_ready(120)
        self._next = time.monotonic()

    def step(self) -> None:
        """Send the next step when it is due, taking results in meanwhile."""
        while True:
            now = time.monotonic()
            if now >= self._next and self._flying < IN_FLIGHT:
                break
            room = self._flying < IN_FLIGHT
            if self.results.poll(max(0.0, self._next - now) if room else 60):
                self._take()
            elif not room:
                raise RuntimeError("no step has come back for 60 s")
        self._next = max(self._next + self.pace, time.monotonic())
        wanted = time.monotonic()
        stamp = self.scheduler.stamp()
        self.wanted[stamp.seq] = wanted
        self.outbox.send_bytes(msgspec.msgpack.encode(Message(stamp, self._slots(stamp.seq), [])))
        self._flying += 1

    def _slots(self, seq: int) -> list[int]:
        """Each sequence's next slot; one at its end starts over, so that the KV stays as large."""
        size = self.shape.block_size
        position = seq % (self.blocks.shape[1] * size)
        return (self.blocks[:, position // size] * size + position % size).tolist()

    def _take(self) -> None:
        message = self._decoder.decode(self.results.recv_bytes())
        self.done[message.stamp.seq] = time.monotonic()
        self.steps[message.stamp.seq] = message
        self.scheduler.retired(message.stamp.seq)
        self._flying -= 1

    def run(self, steps: int) -> None:
        """So many steps."""
        for _ in range(steps):
            self.step()

    def move(self, placement: pk.Placement, options: pk.MigrationOptions) -> pk.Report:
        """A reconfiguration while steps go on."""
        job = self.coordinator.reconfigure(placement, timeout=120, options=options)
        while not job.phase.is_final:
            self.step()
        self.run(2 * IN_FLIGHT)
        return job.wait(0)

    def stop_of(self, seq: int, report: pk.Report | None = None) -> float:
        """What a step waited on its way, beyond the steps before it."""
        first, second = self.steps[seq].times
        before = self.steps[seq - 1].times
        activate = sum(stage.activate_s for stage in report.stages) if report is not None else 0.0
        return (
            max(0.0, first.begin - max(before[0].end, self.wanted[seq]))
            + max(0.0, second.begin - max(before[1].end, first.end))
            + first.gate
            + second.gate
            + activate
        )

    def pause_of(self, report: pk.Report) -> float:
        """The longest wait for a step's tokens from the start of the move to its end."""
        start, end = report.phases[0].start_ns * 1e-9, report.phases[-1].end_ns * 1e-9
        times = sorted(at for at in self.done.values() if start - 1 < at < end + 1)
        return max(
            later - at for at, later in itertools.pairwise(times) if later > start and at < end
        )

    def close(self) -> None:
        """End the processes."""
        self.coordinator.close()
        self.scheduler.close()
        with contextlib.suppress(BrokenPipeError):
            self.outbox.send_bytes(b"")
        for process in self.processes:
            process.join(5)
            process.kill()
            process.join(5)


def measure(shape: Shape, transport: str, arguments: argparse.Namespace) -> Case:
    """All kinds of switchover for one size and transport, taking turns."""
    case = Case(shape, transport)
    with tempfile.TemporaryDirectory(prefix="pipelive-bench-") as record:
        driver = Driver(shape, transport, arguments.step_ms / 1e3, arguments.seed, record)
        try:
            # Out and back first: pages come into being here, and what arrives is compared.
            for placement in (shape.target, shape.source):
                report = driver.move(placement, pk.MigrationOptions(verify=True))
                case.verified_slots += sum(stage.verified_slots for stage in report.stages)
            first = max(driver.steps)
            driver.run(arguments.baseline)
            case.ordinary = [driver.stop_of(seq) for seq in range(first + 2, max(driver.steps))]
            for index in range(2 * arguments.moves):
                there = driver.scheduler.placement == shape.source
                target = shape.target if there else shape.source
                kind = "live" if index % 4 < 2 else "stop_and_copy"
                for name, placement, options in (
                    (kind, target, pk.MigrationOptions(mode=kind)),
                    ("no-op", target, pk.MigrationOptions()),
                ):
                    report = driver.move(placement, options)
                    case.stops[name].append(driver.stop_of(report.step, report))
                    case.pauses[name].append(driver.pause_of(report))
                    case.reports[name].append(report)
        finally:
            driver.close()
    return case


def evaluate(cases: list[Case], pace: float) -> Result:
    """Tables and figures."""
    result = Result("synthetic_move")
    stops, moved = [], []
    for case in cases:
        title = f"{case.shape.moving_bytes / MIB:.0f} MiB, {case.transport}"
        for kind in KINDS:
            stops.append([title, kind, *Spread.of(case.stops[kind]).cells(1e3)])
        stops.append([title, "ordinary step", *Spread.of(case.ordinary).cells(1e3)])
        for kind in KINDS[:2]:
            reports = case.reports[kind]

            def median(values: list[float]) -> str:
                return number(Spread.of(values).p50)

            moved.append([
                title, kind, median([r.seconds for r in reports]),
                median([r.bytes_moved / MIB for r in reports]),
                median([float(len(r.rounds)) for r in reports]),
                median([sum(x.bytes for x in r.rounds) / sum(x.busy_s for x in r.rounds) / 1e9
                        for r in reports]),
                median([r.predicted_stop_s * 1e3 for r in reports]),
                median([p * 1e3 for p in case.pauses[kind]]),
                str(case.verified_slots),
            ])  # fmt: skip
        live, copied = Spread.of(case.stops["live"]), Spread.of(case.stops["stop_and_copy"])
        noop = Spread.of(case.stops["no-op"])
        ratio = copied.p50 / live.p50
        result.figures.append(Figure(
            f"stop-and-copy over live stop time, {title}", ratio, "", "at least 20",
            f"a no-op switchover's {number(noop.p50 * 1e3)} ms ({number(copied.p50 / noop.p50)} times)",
            ratio >= 20,
            f"live p50 {number(live.p50 * 1e3)} p90 {number(live.p90 * 1e3)} p99 "
            f"{number(live.p99 * 1e3)} ms (n = {live.count}), stop-and-copy p50 "
            f"{number(copied.p50 * 1e3)} p90 {number(copied.p90 * 1e3)} ms (n = {copied.count})",
        ))  # fmt: skip
    result.tables.append(Table(
        "Stop, ms", ("case", "switchover", *SPREAD_HEAD), stops,
        "Everything the switchover's step waited; an ordinary step waits for its message only.",
    ))  # fmt: skip
    result.tables.append(Table(
        "The moves (p50)", ("case", "kind", "seconds", "MiB sent", "rounds", "GB/s while busy",
                            "predicted stop, ms", "longest wait for tokens, ms", "slots verified"),
        moved, f"A step is due every {number(pace * 1e3)} ms. Before, all bytes were compared once "
        "in each direction after a move under load.",
    ))  # fmt: skip
    result.data = {
        f"{case.shape.moving_bytes}/{case.transport}": {"stops": case.stops, "pauses": case.pauses}
        for case in cases
    }
    return result


def main() -> None:
    made = parser(__doc__)
    made.add_argument(
        "--mib", type=float, nargs="+", default=[256, 1024], help="live KV that moves"
    )
    made.add_argument("--transports", nargs="+", default=["shm", "tcp"], choices=("shm", "tcp"))
    made.add_argument("--moves", type=int, default=8, help="of each mode; a no-op after each")
    made.add_argument("--layers", type=int, default=4, help="layers that move")
    made.add_argument("--sequences", type=int, default=32, help="one token of each per step")
    made.add_argument("--step-ms", type=float, default=10.0, help="a step is due so often")
    made.add_argument("--baseline", type=int, default=100, help="steps before the moves")
    arguments = made.parse_args()
    started = time.monotonic()
    cases = []
    for size in arguments.mib:
        block = Shape(1, 1, 1).spec.block_bytes * arguments.layers
        blocks = max(arguments.sequences, int(size * MIB) // block)
        shape = Shape(arguments.layers, blocks, arguments.sequences)
        cases += [measure(shape, transport, arguments) for transport in arguments.transports]
    finish(evaluate(cases, arguments.step_ms / 1e3), arguments, started)


if __name__ == "__main__":
    main()
