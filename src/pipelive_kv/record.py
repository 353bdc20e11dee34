"""The decision record: who reconfigures, whether it was committed, and at which step.

A reconfiguration has two possible outcomes, and several processes that may have to know which one
holds after another process has died. So there is one file per epoch, and it can be created only
once: whoever creates it first has decided, everybody else reads what was decided.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from pipelive_kv.errors import CorruptError, InvalidArgumentError

_NAME = re.compile(r"epoch-([0-9]{8,})\.json")


class Decision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The outcome of a reconfiguration."""

    epoch: int
    outcome: Literal["commit", "abort"]
    """``commit``: steps from ``step`` on run the new placement. ``abort``: nothing has changed."""
    step: int = -1
    stages: tuple[tuple[int, ...], ...] = ()
    capacity: int = -1
    """The blocks that every stage can hold after a commit, -1 where it was not worked out."""
    reason: str = ""


class DecisionRecord(Protocol):
    """Where decisions are kept. Every method may be called from any thread and process."""

    def decide(self, decision: Decision) -> Decision:
        """Record ``decision`` unless its epoch is decided; return what holds from now on."""

    def read(self, epoch: int) -> Decision | None:
        """The decision of ``epoch``, or None while there is none."""

    def newest_epoch(self) -> int:
        """The highest epoch that has a decision, -1 while there is none."""


class FileDecisionRecord:
    """One JSON file per epoch in ``directory``, durable before :meth:`decide` returns."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    @property
    def directory(self) -> Path:
        """Where the files lie."""
        return self._directory

    def _path(self, epoch: int) -> Path:
        return self._directory / f"epoch-{epoch:08d}.json"

    def decide(self, decision: Decision) -> Decision:
        """Record ``decision`` unless its epoch is decided already; return what holds.

        The file appears under its name by a hard link of a complete, synchronised file, which
        fails where the name exists: no reader sees a part of it and no second writer replaces it.

        Raises:
            InvalidArgumentError: the epoch is negative, or a commit names no step.
            CorruptError: the epoch's file cannot be read as a decision.
        """
        if decision.epoch < 0:
            raise InvalidArgumentError(f"decision.epoch is {decision.epoch}, expected 0 or more")
        if decision.outcome == "commit" and decision.step < 0:
            raise InvalidArgumentError(
                f"decision.step is {decision.step}, expected the switchover's step number"
            )
        path = self._path(decision.epoch)
        handle, name = tempfile.mkstemp(dir=self._directory, prefix=".decision-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(msgspec.json.encode(decision))
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(name, path)
        finally:
            os.unlink(name)
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        found = self.read(decision.epoch)
        if found is None:
            raise CorruptError(f"decision record {path} vanished after it was written")
        return found

    def read(self, epoch: int) -> Decision | None:
        """The decision of ``epoch``, or None while there is none.

        Raises:
            CorruptError: the file exists and is not a decision of that epoch.
        """
        path = self._path(epoch)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except IsADirectoryError as error:
            raise CorruptError(f"decision record {path} cannot be read: {error}") from error
        try:
            decision = msgspec.json.decode(content, type=Decision)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise CorruptError(f"decision record {path} cannot be read: {error}") from error
        if decision.epoch != epoch:
            raise CorruptError(
                f"decision record {path} is of epoch {decision.epoch}, expected {epoch}"
            )
        return decision

    def newest_epoch(self) -> int:
        """The highest epoch that has a decision, -1 while there is none."""
        names = (_NAME.fullmatch(path.name) for path in self._directory.iterdir())
        return max((int(name[1]) for name in names if name is not None), default=-1)
