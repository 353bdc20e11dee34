"""Where libnccl is, what it can do, and whose turn a device is."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from pipelive_kv import _core

SONAME = "libnccl.so.2"


@dataclass(frozen=True)
class NcclProbe:
    """What :func:`nccl_probe` found."""

    version: str
    """Such as ``"2.27.3"``; empty where there is none that can be used."""
    version_code: int
    path: str
    launch_order: bool
    """Launches of several communicators can be ordered (NCCL_LAUNCH_ORDER_IMPLICIT, 2.26)."""
    multi_rank_gpu: bool
    """Two ranks may share one GPU (NCCL_MULTI_RANK_GPU_ENABLE=1, 2.30)."""
    problem: str
    """Why no NCCL can be used, and what was tried; empty where one can."""


def nccl_candidates() -> list[str]:
    """Where libnccl is looked for, in this order: wheels, torch's own folder, the loader's paths.

    A library that the process has loaded already (torch's, mostly) comes before all of them.
    """
    found: list[str] = []
    for package, inside in (("nvidia.nccl", "lib"), ("torch", "lib")):
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            continue
        if spec is None:
            continue
        folders = list(spec.submodule_search_locations or ())
        paths = [Path(folder) / inside / SONAME for folder in folders]
        found += [str(path) for path in paths if path.is_file()]
    return [*found, SONAME]


def nccl_probe() -> NcclProbe:
    """Find NCCL and say what it can do; never raises for one that is missing or broken."""
    code, version, path, launch_order, multi_rank_gpu, problem = _core.nccl_probe(nccl_candidates())
    return NcclProbe(version, code, path, launch_order, multi_rank_gpu, problem)


class DeviceTurn:
    """Whose turn it is to have NCCL work under way on one device of this process.

    Two communicators on a device whose operations two ranks issue in different orders wait on each
    other for ever. Patches that travel by NCCL hold both turns while they transfer; an
    engine that uses NCCL on the same device holds it from before it issues until its work has
    completed, and so the two can never wait in a circle::

        with DeviceTurn("cuda:0", holder="all-reduce", timeout=30):
            dist.all_reduce(x)
            torch.cuda.current_stream().synchronize()

    All objects for one device share one turn. ``with`` raises DeadlineError naming the holder.
    """

    def __init__(self, device: str, *, holder: str = "the engine", timeout: float = 30.0) -> None:
        self._core = _core.DeviceTurn(device)
        self._name = holder
        self._timeout = timeout

    @property
    def holder(self) -> str:
        """Who has it; empty where nobody does."""
        holder: str = self._core.holder
        return holder

    def try_take(self) -> bool:
        """Take it if it is free."""
        taken: bool = self._core.try_take(self._name)
        return taken

    def take(self, timeout: float | None = None) -> None:
        """Wait for it; raises DeadlineError naming who has it."""
        self._core.take(self._name, self._timeout if timeout is None else timeout)

    def give(self) -> None:
        """Give it back; raises InvalidArgumentError where nobody has it."""
        self._core.give()

    def __enter__(self) -> DeviceTurn:
        self.take()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.give()
