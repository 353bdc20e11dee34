"""Memory of a shrinking KV cache: bytes of live blocks over bytes of pages held.

A named trace ("churn-7": kind and seed) of requests that come, grow and end runs over a real pool:
many requests first, few after. Three policies: the pool keeps its size; it gives back what lies
above the highest live block; it moves live blocks down first (compaction).
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path

import pipelive_kv as pk
from common import MIB, Figure, Result, Spread, Table, finish, number, parser

POLICIES = ("keep", "shrink", "compact")
WORDS = {
    "keep": "as it was",
    "shrink": "shrunk without moves",
    "compact": "shrunk after compaction",
}
PAGE = 2 << 20


@dataclass(frozen=True)
class Block:
    """A model's KV: 64 KiB per layer and block as in Llama 3, or 12 KiB as in SmolLM2."""

    name: str
    spec: pk.KVSpec
    layers: int = 8


BLOCKS = (
    Block("64 KiB", pk.KVSpec(8, 128, "bfloat16", 16)),
    Block("12 KiB", pk.KVSpec(3, 64, "bfloat16", 16)),
)


@dataclass(frozen=True)
class Event:
    """What happens in a tick: requests that end, (request, blocks) that are taken."""

    ended: tuple[int, ...]
    taken: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Sample:
    """The pool after a tick, in bytes."""

    live: int
    held: int


def churn(seed: int, ticks: int, most: int) -> list[Event]:
    """Requests with prompts of 1 to 16 blocks that gain a block now and then; load falls halfway.

    In the first half about 90 % of ``most`` blocks are wanted, in the second about 20 %.
    """
    rng = random.Random(seed)
    events: list[Event] = []
    running: dict[int, tuple[int, int]] = {}  # request -> blocks, tick of its end
    number_ = 0
    for tick in range(ticks):
        wanted = (0.9 if tick < ticks // 2 else 0.2) * most
        ended = [request for request, (_, end) in running.items() if end <= tick]
        for request in ended:
            del running[request]
        taken: list[tuple[int, int]] = []
        used = sum(blocks for blocks, _ in running.values())
        for request, (blocks, end) in running.items():
            if rng.random() < 0.1 and used < most - 16:
                running[request] = (blocks + 1, end)
                taken.append((request, 1))
                used += 1
        while used < wanted - 16:
            blocks = rng.randint(1, 16)
            running[number_] = (blocks, tick + rng.randint(5, 80))
            taken.append((number_, blocks))
            used += blocks
            number_ += 1
        events.append(Event(tuple(ended), tuple(taken)))
    return events


def play(
    events: list[Event], kind: Block, stack: int, policy: str, most: int, every: int
) -> tuple[list[Sample], int]:
    """Run a trace over a pool; a sample per tick, and how many blocks were moved."""
    allocator = pk.BlockAllocator(most, most)
    held: dict[int, list[int]] = {}
    samples, moved = [], 0
    with pk.KVPool(
        kind.spec,
        num_layers=kind.layers,
        layers=range(kind.layers),
        max_blocks=most,
        capacity=most,
        stack=stack,
        page_bytes=PAGE,
    ) as pool:
        for tick, event in enumerate(events):
            for request in event.ended:
                allocator.release(held.pop(request))
            for request, count in event.taken:
                lacking = count - allocator.num_free
                if lacking > 0:
                    pool.grow(allocator.capacity + lacking)
                    allocator.raise_capacity(allocator.capacity + lacking)
                held.setdefault(request, []).extend(allocator.allocate(count))
            if policy != "keep" and tick % every == every - 1:
                live = allocator.live()
                capacity = len(live) if policy == "compact" else live[-1] + 1
                moves = allocator.plan_shrink(capacity)
                pool.shrink(capacity, live=live, moves=moves)
                allocator.apply_shrink(capacity, moves)
                pool.page_pool.trim()
                moved += len(moves)
                for blocks in held.values():
                    blocks[:] = [moves.get(block, block) for block in blocks]
            live_bytes = allocator.num_live * kind.spec.block_bytes * kind.layers
            samples.append(Sample(live_bytes, pool.page_pool.held_bytes))
    return samples, moved


def draw(path: Path, trace: str, runs: dict[tuple[str, int], list[Sample]], kind: Block) -> None:
    """Memory over time, a panel per stack."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    stacks = sorted({stack for _, stack in runs})
    figure, axes = plt.subplots(
        1, len(stacks), figsize=(4.6 * len(stacks), 3.6), sharey=True, squeeze=False
    )
    colors = {"keep": "#9a9a9a", "shrink": "#4c78a8", "compact": "#e4572e"}
    for axis, stack in zip(axes[0], stacks, strict=True):
        for policy in POLICIES:
            held = [sample.held / MIB for sample in runs[policy, stack]]
            axis.step(range(len(held)), held, where="post", color=colors[policy], lw=1.5,
                      label=f"held, {WORDS[policy]}")  # fmt: skip
        live = [sample.live / MIB for sample in runs["keep", stack]]
        axis.fill_between(range(len(live)), live, step="post", color="#54a24b", alpha=0.35,
                          lw=0, label="live blocks")  # fmt: skip
        axis.set_title(f"stack of {stack}")
        axis.set_xlabel("tick")
        axis.set_ylim(0, None)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("MiB")
    axes[0][-1].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{trace}: KV memory, blocks of {kind.name} per layer, {kind.layers} layers")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def evaluate(arguments: argparse.Namespace) -> Result:
    """Run all traces; tables and figures."""
    result, rows = Result("utilisation"), []
    for kind in BLOCKS:
        by_stack: dict[int, dict[str, Spread]] = {}
        for stack in arguments.stacks:
            shares: dict[str, list[float]] = {policy: [] for policy in POLICIES}
            moves: list[float] = []
            for trace in arguments.traces:
                events = churn(int(trace.partition("-")[2]), arguments.ticks, arguments.blocks)
                runs = {}
                for policy in POLICIES:
                    samples, moved = play(
                        events, kind, stack, policy, arguments.blocks, arguments.every
                    )
                    runs[policy, stack] = samples
                    # What is left at the end, when few requests run and a shrink has just been.
                    shares[policy].append(samples[-1].live / samples[-1].held)
                    if policy == "compact":
                        moves.append(float(moved))
                if trace == arguments.traces[0] and kind is BLOCKS[0]:
                    result.data.setdefault("samples", {})[str(stack)] = {
                        policy: [[s.live, s.held] for s in run] for (policy, _), run in runs.items()
                    }
            by_stack[stack] = {policy: Spread.of(values) for policy, values in shares.items()}
            for policy in POLICIES:
                found = by_stack[stack][policy]
                rows.append([
                    kind.name, str(stack), WORDS[policy], number(found.p50),
                    f"{number(min(shares[policy]))} to {number(found.max)}",
                    number(Spread.of(moves).p50) if policy == "compact" else "0",
                ])  # fmt: skip
        last = arguments.stacks[-1]
        found = by_stack[last]
        result.figures.append(Figure(
            f"utilisation after shrink with compaction, stack {last}, blocks of {kind.name}",
            found["compact"].p50, "", "about 0.95 (stack of 4)",
            f"before the shrink {number(found['keep'].p50)}, without moves "
            f"{number(found['shrink'].p50)}; whole pages of 2 MiB per stack",
            found["compact"].p50 >= 0.945, f"stack {arguments.stacks[0]}: "
            f"{number(by_stack[arguments.stacks[0]]['compact'].p50)}; n = {found['compact'].count}",
        ))  # fmt: skip
    result.tables.append(Table(
        f"Live over held bytes at the end of {', '.join(arguments.traces)}",
        ("block of a layer", "stack", "pool", "p50", "range", "blocks moved, whole trace"), rows,
        f"Shrinks every {arguments.every} ticks. Wanted are the PipeLive paper's figures: 0.56 "
        "without stacks, 0.95 with stacks of 4.",
    ))  # fmt: skip
    return result


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--traces", nargs="+", default=[f"churn-{seed}" for seed in range(7, 12)])
    made.add_argument("--stacks", type=int, nargs="+", default=[1, 2, 4])
    made.add_argument("--ticks", type=int, default=240)
    made.add_argument("--blocks", type=int, default=1024, help="of the pool at its largest")
    made.add_argument("--every", type=int, default=20, help="ticks from shrink to shrink")
    made.add_argument("--png", type=Path, help="drawing of memory over time, of the first trace")
    arguments = made.parse_args()
    for trace in arguments.traces:
        if trace.partition("-")[0] != "churn" or not trace.partition("-")[2].isdigit():
            made.error(f"--traces: {trace!r}; expected churn-SEED")
    started = time.monotonic()
    result = evaluate(arguments)
    if arguments.png is not None:
        samples = {
            (policy, int(stack)): [Sample(*pair) for pair in run]
            for stack, runs in result.data["samples"].items()
            for policy, run in runs.items()
        }
        draw(arguments.png, arguments.traces[0], samples, BLOCKS[0])
    finish(result, arguments, started)


if __name__ == "__main__":
    main()
