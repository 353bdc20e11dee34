"""The command line: ``pipelive-kv demo``, ``doctor``, ``info`` and ``--version``."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from pipelive_kv.build_info import build_info
from pipelive_kv.errors import PipeliveError

if TYPE_CHECKING:
    from pipelive_kv.demo import DemoOptions
    from pipelive_kv.demo.view import View

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
DEMO_PACKAGES = ("torch", "transformers", "safetensors", "matplotlib", "rich")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0: done. 1: it failed, or a token differs. 2: an argument is wrong. 130: interrupted.
    """
    try:
        parsed = _parser().parse_args(arguments)
    except SystemExit as end:  # argparse has said what is wrong, or shown its help
        return int(end.code or 0)
    if parsed.command == "info":
        print(build_info())
        return OK
    if parsed.command == "doctor":
        return _doctor(as_json=parsed.json)
    return _demo(parsed)


class _Version(argparse.Action):
    """Asks the library for its version only where somebody wants to know."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"pipelive-kv {build_info().version}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    from pipelive_kv.demo.options import add_arguments  # noqa: PLC0415

    parser = argparse.ArgumentParser(
        prog="pipelive-kv",
        description="KV-cache and live layer migration runtime for pipeline-parallel LLM serving.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("info", help="show how the library was built")
    doctor = commands.add_parser(
        "doctor",
        help="show what this machine offers and what is missing",
        description="Looks at the CUDA driver, every GPU, NCCL and this build, and says in plain "
        "words what is missing. The exit status is 0 also where there is no GPU.",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead")
    demo = commands.add_parser(
        "demo",
        help="move layers between stage processes while requests decode",
        description="Runs a model over stage processes, moves layers to another placement and back "
        "while every request decodes, and checks that no token differs from a run without moves. "
        "Writes report.json, timeline.png and trace.json.",
    )
    add_arguments(demo)
    return parser


def _doctor(*, as_json: bool) -> int:
    from pipelive_kv.doctor import examine  # noqa: PLC0415

    report = examine()
    print(report.to_json() if as_json else report)
    return OK


def _demo(parsed: argparse.Namespace) -> int:
    from pipelive_kv.demo.options import OptionError, options_from  # noqa: PLC0415

    try:
        options = options_from(parsed)
    except OptionError as error:
        return _refuse(str(error))
    missing = [name for name in DEMO_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"pipelive-kv demo: {', '.join(missing)} not installed; install pipelive-kv[demo]",
            file=sys.stderr,
        )
        return FAILED
    try:
        with _interruptible():
            return _run_demo(options)
    except OptionError as error:
        return _refuse(str(error))
    except PipeliveError as error:
        print(f"pipelive-kv demo: {type(error).__name__}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("pipelive-kv demo: interrupted; the stage processes are ended", file=sys.stderr)
        return INTERRUPTED


def _run_demo(options: DemoOptions) -> int:
    from rich.console import Console  # noqa: PLC0415

    from pipelive_kv.demo.run import run_demo, to_json  # noqa: PLC0415
    from pipelive_kv.demo.summary import print_summary  # noqa: PLC0415

    view = _view(options)
    try:
        report = run_demo(options, view)
    finally:
        view.close()
    if options.json:
        sys.stdout.buffer.write(to_json(report))
        sys.stdout.flush()
    else:
        console = Console()
        if not console.is_terminal:
            console = Console(width=110)  # tables that a log can hold, whatever it takes for width
        print_summary(report, console, options.out)
    return OK if report.ok else FAILED


def _view(options: DemoOptions) -> View:
    """A moving picture on a terminal, lines otherwise; with ``--json`` stdout is the report's."""
    from rich.console import Console  # noqa: PLC0415

    from pipelive_kv.demo.live import LiveView  # noqa: PLC0415
    from pipelive_kv.demo.view import LineView  # noqa: PLC0415

    console = Console(stderr=options.json)
    if console.is_terminal:
        return LiveView(console)
    return LineView(sys.stderr if options.json else sys.stdout)


def _refuse(message: str) -> int:
    print(f"pipelive-kv demo: {message}", file=sys.stderr)
    return USAGE


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Have SIGTERM end the run as Ctrl-C does: by an exception that closes everything."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
