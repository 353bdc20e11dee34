"""Settings that all tests share: Hypothesis profiles, and what a test needs to be run."""

from __future__ import annotations

import faulthandler
import os
import secrets
import sys
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from pipelive_kv.build_info import build_info

# Deadlines are off: machines that run tests are shared, so a slow example says nothing.
_SHARED = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow],
}
settings.register_profile("ci", max_examples=40, stateful_step_count=30, **_SHARED)
settings.register_profile("dev", max_examples=100, **_SHARED)
settings.register_profile("thorough", max_examples=2000, stateful_step_count=100, **_SHARED)
# Without shrinking, a failure shows the example as it was found; for tests that are slow to repeat.
settings.register_profile(
    "no-shrink", max_examples=100, phases=[Phase.explicit, Phase.reuse, Phase.generate], **_SHARED
)


# Where stacks go while pytest captures the process's own standard error.
_STDERR = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """See pytest_runtest_protocol."""
    what = "how long after its timeout a test that does not return is ended with its process"
    parser.addoption("--hang-grace", type=float, default=60.0, metavar="SECONDS", help=what)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Choose profile and seed before Hypothesis' own plugin reads them."""
    profile = (
        config.getoption("--hypothesis-profile")
        or os.environ.get("HYPOTHESIS_PROFILE")
        or ("ci" if os.environ.get("CI") else "dev")
    )
    settings.load_profile(profile)
    config.option.hypothesis_profile = profile
    # Known failures are replayed from Hypothesis' database only while no seed is forced, which is
    # what a developer wants; elsewhere a seed makes the run repeatable.
    if profile != "dev" and config.getoption("--hypothesis-seed") is None:
        config.option.hypothesis_seed = str(secrets.randbelow(2**32))
    config.stash[_STDERR] = os.dup(sys.__stderr__.fileno() if sys.__stderr__ else 2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """End the process, with the stacks of its threads, where a test outlives its timeout.

    pytest-timeout interrupts Python; nothing interrupts a call of the core that does not return.
    """
    config = item.config
    # Where pytest itself is to print stacks there is no second clock for that.
    if config.getoption("usepdb") or float(config.getini("faulthandler_timeout") or 0) > 0:
        return (yield)
    marker = item.get_closest_marker("timeout")
    chosen = marker.args[0] if marker else config.getoption("timeout", None)
    seconds = float(config.getini("timeout") if chosen is None else chosen)
    if seconds <= 0:  # no limit is wanted
        return (yield)
    grace: float = config.getoption("--hang-grace")
    faulthandler.dump_traceback_later(seconds + grace, exit=True, file=config.stash[_STDERR])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_report_header(config: pytest.Config) -> str:
    """Say how to repeat this run's random choices."""
    profile = config.getoption("--hypothesis-profile")
    seed = config.getoption("--hypothesis-seed")
    chosen = f"--hypothesis-profile={profile}"
    return f"repeat with: {chosen}" + ("" if seed is None else f" --hypothesis-seed={seed}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where no device can be used, saying what is missing."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    missing = build_info().cuda_missing
    if missing:
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason=f"no GPU: {missing}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Stop after a test that has cost this process its GPU: every later one would fail as well."""
    report = yield
    if report.failed and item.get_closest_marker("gpu"):
        lost = what_lost_the_gpu()
        if lost:
            item.session.shouldstop = f"this process cannot use its GPU any more: {lost}"
    return report


def what_lost_the_gpu() -> str:
    """The error that all of torch's calls end in since some kernel's; empty if there is none."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return ""
