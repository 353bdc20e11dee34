"""The exceptions of the package; all derive from :class:`PipeliveError`."""

from __future__ import annotations

from pipelive_kv._core import (
    BusyError,
    CancelledError,
    ClosedError,
    CorruptError,
    DeadlineError,
    DeviceError,
    InvalidArgumentError,
    NotResidentError,
    OutOfMemoryError,
    OverBudgetError,
    PipeliveError,
    ProtocolError,
)

__all__ = [
    "BusyError",
    "CancelledError",
    "ClosedError",
    "CorruptError",
    "DeadlineError",
    "DeviceError",
    "InvalidArgumentError",
    "NotResidentError",
    "OutOfMemoryError",
    "OverBudgetError",
    "PipeliveError",
    "ProtocolError",
    "by_name",
]

_CLASSES: dict[str, type[PipeliveError]] = {
    cls.__name__: cls
    for cls in (
        BusyError,
        CancelledError,
        ClosedError,
        CorruptError,
        DeadlineError,
        DeviceError,
        InvalidArgumentError,
        NotResidentError,
        OutOfMemoryError,
        OverBudgetError,
        ProtocolError,
    )
}


def by_name(name: str) -> type[PipeliveError]:
    """The exception class of that name; PipeliveError for a name that is not ours."""
    return _CLASSES.get(name, PipeliveError)
