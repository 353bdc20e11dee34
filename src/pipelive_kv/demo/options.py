"""What the demo is asked to do: the arguments, their meaning and what is refused."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelive_kv.errors import InvalidArgumentError
from pipelive_kv.placement import Placement

MAX_STAGES = 8
MAX_REQUESTS = 32
MIN_NEW_TOKENS = 24
MAX_NEW_TOKENS = 1024
TRANSPORTS = ("auto", "shm", "tcp")


class OptionError(ValueError):
    """An option has a value that makes no sense; the message names option, value, expectation."""


@dataclass(frozen=True)
class DemoOptions:
    """What one run of the demo does.

    Attributes:
        stages: stage processes.
        source: layers per stage at the start; None: made from the model's number of layers.
        target: layers per stage after the move; None: the source's, reversed.
        requests: all but two are there from the start, one more arrives inside each move.
        new_tokens: each request's, always that many.
        model: folder of a Hugging Face model; None for the one that the demo brings along.
        transport: how KV travels between stages.
        device: where the stages run: "cpu", "cuda" (the GPUs in turn) or "cuda:0".
        json: print the report and nothing else.
        quick: a short variant.
        out: folder of report.json, trace.json and timeline.png.
        corrupt: zero a moved layer's KV at the switchover, so that the run must fail.
    """

    stages: int = 2
    source: tuple[int, ...] | None = None
    target: tuple[int, ...] | None = None
    requests: int = 10
    new_tokens: int = 128
    model: Path | None = None
    transport: str = "auto"
    device: str = "cpu"
    json: bool = False
    quick: bool = False
    out: Path = Path("build/demo")
    corrupt: bool = False

    def placements(self, num_layers: int) -> tuple[Placement, Placement]:
        """The two placements for a model of ``num_layers`` layers.

        Raises:
            OptionError: the counts do not add up to the model's layers.
        """
        source = self.source
        if source is None:
            source = (
                tuple(reversed(self.target))
                if self.target is not None
                else uneven_counts(num_layers, self.stages)
            )
        target = self.target if self.target is not None else tuple(reversed(source))
        for name, counts in (("--from", source), ("--to", target)):
            if sum(counts) != num_layers:
                raise OptionError(
                    f"{name} is {_joined(counts)}, {sum(counts)} layers together; expected "
                    f"{num_layers}, the layers of the model"
                )
        if source == target:
            raise OptionError(
                f"--to is {_joined(target)}, the same as --from; expected another placement, so "
                "that layers move"
            )
        return Placement.from_counts(source), Placement.from_counts(target)


def uneven_counts(num_layers: int, stages: int) -> tuple[int, ...]:
    """Layers per stage in the proportion stages : ... : 2 : 1, every stage with at least one."""
    if num_layers < stages:
        raise OptionError(
            f"--stages is {stages}; expected at most {num_layers}, the layers of the model"
        )
    total = stages * (stages + 1) // 2
    counts = [max(1, num_layers * (stages - rank) // total) for rank in range(stages)]
    counts[0] += num_layers - sum(counts)
    return tuple(counts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's arguments to a parser; values are checked by :func:`options_from`."""
    add = parser.add_argument
    add("--stages", metavar="N", help="stage processes (2)")
    add("--from", dest="source", metavar="A,B", help="layers of each stage at first (20,10)")
    add("--to", dest="target", metavar="A,B", help="layers of each stage after the move (10,20)")
    add("--requests", metavar="N", help="requests; one of them arrives in each move (10)")
    add("--new-tokens", metavar="N", help="tokens that each request generates (128)")
    add("--model", metavar="DIR", help="folder of a Hugging Face causal model (SmolLM2-135M)")
    add("--transport", metavar="KIND", help="how KV travels: auto, shm or tcp (auto)")
    add("--device", metavar="NAME", help="where stages run: cpu, cuda, or cuda:0 (cpu)")
    add("--out", metavar="DIR", help="folder for report, trace and timeline (build/demo)")
    add("--json", action="store_true", help="print the report as JSON and nothing else")
    add("--quick", action="store_true", help="fewer requests and tokens, for a slow machine")
    add(
        "--corrupt",
        action="store_true",
        help="negative control: zero a moved layer's KV at the switchover; the run must fail",
    )


def options_from(arguments: argparse.Namespace) -> DemoOptions:
    """Check the arguments.

    Raises:
        OptionError: naming the option, its value and what was expected.
    """
    source = _counts("--from", arguments.source)
    target = _counts("--to", arguments.target)
    named = [(name, c) for name, c in (("--from", source), ("--to", target)) if c is not None]
    stages = _integer("--stages", arguments.stages, 2, MAX_STAGES)
    if stages is None:
        stages = len(named[0][1]) if named else 2
    for name, counts in named:
        if len(counts) != stages:
            raise OptionError(
                f"{name} is {_joined(counts)}, {len(counts)} stages; expected {stages} numbers"
            )
    quick = bool(arguments.quick)
    requests = _integer("--requests", arguments.requests, 2, MAX_REQUESTS)
    tokens = _integer("--new-tokens", arguments.new_tokens, MIN_NEW_TOKENS, MAX_NEW_TOKENS)
    transport = arguments.transport if arguments.transport is not None else "auto"
    if transport not in TRANSPORTS:
        raise OptionError(f"--transport is {transport!r}; expected {', '.join(TRANSPORTS)}")
    device = arguments.device if arguments.device is not None else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise OptionError(f"--device is {device!r}; expected cpu, cuda, or a GPU such as cuda:0")
    model = None if arguments.model is None else Path(arguments.model)
    if model is not None and not (model / "config.json").is_file():
        raise OptionError(f"--model is {str(model)!r}; expected a folder with a config.json")
    out = Path(arguments.out) if arguments.out is not None else DemoOptions.out
    if out.exists() and not out.is_dir():
        raise OptionError(f"--out is {str(out)!r}, which is no folder; expected a folder to make")
    return DemoOptions(
        stages=stages,
        source=source,
        target=target,
        requests=requests if requests is not None else (4 if quick else DemoOptions.requests),
        new_tokens=tokens if tokens is not None else (40 if quick else DemoOptions.new_tokens),
        model=model,
        transport=transport,
        device=device,
        json=bool(arguments.json),
        quick=quick,
        out=out,
        corrupt=bool(arguments.corrupt),
    )


def parse(arguments: Sequence[str]) -> DemoOptions:
    """The options that ``pipelive-kv demo ARGUMENTS`` means."""
    parser = argparse.ArgumentParser(prog="pipelive-kv demo", exit_on_error=False)
    add_arguments(parser)
    return options_from(parser.parse_args(list(arguments)))


def _integer(name: str, text: str | None, low: int, high: int) -> int | None:
    if text is None:
        return None
    try:
        value = int(text)
    except ValueError:
        raise OptionError(f"{name} is {text!r}; expected a number of {low} to {high}") from None
    if not low <= value <= high:
        raise OptionError(f"{name} is {value}; expected {low} to {high}")
    return value


def _counts(name: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        counts = tuple(int(part) for part in text.split(","))
        Placement.from_counts(counts)
    except (ValueError, InvalidArgumentError):
        raise OptionError(
            f"{name} is {text!r}; expected layers per stage, such as 20,10: numbers of 0 or more"
        ) from None
    if not 2 <= len(counts) <= MAX_STAGES:
        raise OptionError(
            f"{name} is {text!r}, {len(counts)} stages; expected 2 to {MAX_STAGES} numbers"
        )
    return counts


def _joined(counts: Sequence[int]) -> str:
    return ",".join(map(str, counts))
