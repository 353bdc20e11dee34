"""A test run ends where a process has lost its GPU, and only there."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from tests.conftest import pytest_runtest_makereport

LOST = "CUDA error: an illegal memory access was encountered"


def stop_after(
    monkeypatch: pytest.MonkeyPatch, *, failed: bool, marks: set[str], initialised: bool, error: str
) -> object:
    def synchronize() -> None:
        if error:
            raise RuntimeError(f"{error}\nCompile with TORCH_USE_CUDA_DSA")

    cuda = SimpleNamespace(is_initialized=lambda: initialised, synchronize=synchronize)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    session = SimpleNamespace(shouldstop=False)
    item = SimpleNamespace(session=session, get_closest_marker=lambda name: name in marks)
    report = SimpleNamespace(failed=failed)
    hook = pytest_runtest_makereport(item, None)  # type: ignore[arg-type]
    next(hook)
    with pytest.raises(StopIteration) as end:
        hook.send(report)  # type: ignore[arg-type]
    assert end.value.value is report
    return session.shouldstop


def test_a_lost_context_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = stop_after(monkeypatch, failed=True, marks={"gpu"}, initialised=True, error=LOST)
    assert isinstance(stop, str)
    assert stop.endswith(LOST)


@pytest.mark.parametrize(
    ("failed", "marks", "initialised", "error"),
    [
        (False, {"gpu"}, True, LOST),
        (True, {"slow"}, True, LOST),
        (True, {"gpu"}, False, LOST),
        (True, {"gpu"}, True, ""),
    ],
)
def test_anything_else_does_not(
    monkeypatch: pytest.MonkeyPatch, failed: bool, marks: set[str], initialised: bool, error: str
) -> None:
    stop = stop_after(monkeypatch, failed=failed, marks=marks, initialised=initialised, error=error)
    assert stop is False
