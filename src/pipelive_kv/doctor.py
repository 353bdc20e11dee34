"""What a machine offers the library and what is missing: ``pipelive-kv doctor``."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelive_kv import _core, cuda_arrays
from pipelive_kv.build_info import DRIVER_LIBRARY, BuildInfo, build_info

__all__ = ["Gpu", "HealthReport", "examine"]


@dataclass(frozen=True)
class Gpu:
    """One GPU; sizes in bytes.

    ``granularity`` is what page sizes must be multiples of. ``exportable`` and ``rdma`` were tried
    with a page: whether it can be passed to other processes, and used for GPUDirect RDMA.
    ``peers`` are the GPUs whose memory it can access directly. ``problem`` says why it cannot be
    used, and is empty where it can; ``kernel_problem`` why neither this build nor NVRTC has kernels
    for it.
    """

    index: int
    name: str
    uuid: str
    pci_bus_id: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    copy_engines: int
    memory_total: int
    memory_free: int
    granularity: int
    recommended_granularity: int
    exportable: bool
    rdma: bool
    peers: tuple[int, ...]
    problem: str
    kernel_problem: str


@dataclass(frozen=True)
class HealthReport:
    """What was found.

    Attributes:
        version: of pipelive_kv.
        attention_isa: the processor's instruction sets that attention kernels exist for.
        kernels: the CUDA kernel files in this build, by name.
        kernel_archs: what they were compiled for; "sm_90" is machine code, "compute_100" PTX.
        kernel_compiler: the version of the nvcc that compiled them; empty where none did.
        driver_library: the driver's library that was looked for.
        driver_version: the newest CUDA version that the driver supports, such as "12.8"; None where
            the driver cannot be used.
        gpus: every GPU that the driver sees.
        nccl: what the NCCL transport says of its library; None where this build has no such
            transport.
        packages: the versions of packages that work with the library; None for those not there.
        missing: everything that is not as one would wish, in sentences; empty if nothing is.
    """

    version: str
    attention_isa: tuple[str, ...]
    kernels: tuple[str, ...]
    kernel_archs: tuple[str, ...]
    kernel_compiler: str
    driver_library: str
    driver_version: str | None
    gpus: tuple[Gpu, ...]
    nccl: Mapping[str, Any] | None
    packages: Mapping[str, str | None]
    missing: tuple[str, ...]

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str)

    def __str__(self) -> str:
        """Lay the report out for a terminal."""
        lines = [
            f"pipelive-kv    {self.version}",
            f"processor      attention kernels for {', '.join(self.attention_isa)}",
            f"CUDA kernels   {self._kernel_line()}",
            f"CUDA driver    {self.driver_version or 'none'} ({self.driver_library})",
        ]
        for gpu in self.gpus:
            lines += _gpu_lines(gpu)
        if self.nccl is not None:
            told = ", ".join(f"{key} {_plain(value)}" for key, value in self.nccl.items() if value)
            lines.append(f"NCCL           {told or 'none'}")
        found = ", ".join(f"{name} {version or '-'}" for name, version in self.packages.items())
        lines.append(f"packages       {found}")
        if self.missing:
            lines += ["", "missing:", *(f"  - {sentence}" for sentence in self.missing)]
        else:
            lines += ["", "nothing is missing"]
        return "\n".join(lines)

    def _kernel_line(self) -> str:
        if not self.kernels:
            return "none in this build"
        archs = ", ".join(self.kernel_archs)
        return f"{', '.join(self.kernels)}; {archs}; nvcc {self.kernel_compiler}"


def examine(*, driver_library: str = DRIVER_LIBRARY) -> HealthReport:
    """Look at the build, the driver, every GPU and NCCL. Raises nothing for what is not there.

    Args:
        driver_library: name or path of the driver's shared library, as for ``dlopen``.
    """
    built = build_info(driver_library=driver_library)
    cuda_arrays.offer_compilers()
    cuda = _core.cuda_report(driver_library)
    gpus = tuple(
        Gpu(
            **{
                **gpu,
                "compute_capability": tuple(gpu["compute_capability"]),
                "peers": tuple(gpu["peers"]),
            }
        )
        for gpu in cuda["devices"]
    )
    nccl = _probe_nccl()
    version: int | None = cuda["driver_version"]
    missing = [
        *_missing_driver(cuda["problem"], gpus),
        *_missing_kernels(built, gpus),
        *(sentence for gpu in gpus for sentence in _missing_of(gpu, len(gpus))),
        *_missing_symbols(cuda["missing"]),
    ]
    if gpus and nccl is not None and nccl.get("problem"):
        missing.append(f"NCCL cannot be used: {nccl['problem']}")
    return HealthReport(
        version=built.version,
        attention_isa=built.attention_isa,
        kernels=built.cuda_kernels,
        kernel_archs=built.cuda_archs,
        kernel_compiler=built.cuda_compiler,
        driver_library=driver_library,
        driver_version=None if version is None else f"{version // 1000}.{version % 1000 // 10}",
        gpus=gpus,
        nccl=nccl,
        packages={name: _version_of(name) for name in ("torch", "cupy", "numpy")},
        missing=tuple(missing),
    )


def _probe_nccl() -> dict[str, Any] | None:
    """What ``pipelive_kv.transport.nccl_probe()`` says, where the transport offers it.

    It returns a mapping or a dataclass with at least ``version`` and ``problem``.
    """
    probe = getattr(importlib.import_module("pipelive_kv.transport"), "nccl_probe", None)
    if probe is None:
        return None
    found = probe()
    if dataclasses.is_dataclass(found) and not isinstance(found, type):
        return dataclasses.asdict(found)
    return dict(found)


def _version_of(package: str) -> str | None:
    """Without importing it, which takes seconds for some."""
    if importlib.util.find_spec(package) is None:
        return None
    metadata = importlib.import_module("importlib.metadata")
    owners = metadata.packages_distributions().get(package, [package])
    try:
        return str(metadata.version(owners[0]))
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _missing_driver(problem: str, gpus: tuple[Gpu, ...]) -> list[str]:
    if gpus or not problem:
        return []
    return [f"no GPU can be used: {problem}. Everything works on the CPU (device='cpu')"]


def _missing_kernels(built: BuildInfo, gpus: tuple[Gpu, ...]) -> list[str]:
    if not gpus and not built.cuda_kernels:
        return [
            "CUDA kernels are not in this build, which was compiled without nvcc; on a GPU NVRTC "
            "would have to compile them at first use"
        ]
    return [
        f"cuda:{gpu.index} ({gpu.name}) has no kernels: {gpu.kernel_problem}"
        for gpu in gpus
        if gpu.kernel_problem
    ]


def _missing_of(gpu: Gpu, count: int) -> list[str]:
    name = f"cuda:{gpu.index} ({gpu.name})"
    if gpu.problem:
        return [f"{name} cannot be used: {gpu.problem}"]
    sentences = []
    if not gpu.exportable:
        sentences.append(f"{name} cannot pass pages to other processes, so P2P does not work")
    if not gpu.rdma:
        sentences.append(f"{name} has no GPUDirect RDMA: between hosts data goes through the host")
    strangers = sorted(set(range(count)) - {gpu.index, *gpu.peers})
    if strangers:
        others = ", ".join(f"cuda:{index}" for index in strangers)
        sentences.append(f"{name} cannot access the memory of {others} directly")
    return sentences


def _missing_symbols(symbols: list[str]) -> list[str]:
    """Copies in batches exist in an older and a newer form; either serves."""
    batches = {"cuMemcpyBatchAsync", "cuMemcpyBatchAsync_v2"}
    lost = [symbol for symbol in symbols if symbol not in batches]
    if batches <= set(symbols):
        lost.append("cuMemcpyBatchAsync")
    return [f"the driver lacks {symbol}; slower calls take its place" for symbol in lost]


def _gpu_lines(gpu: Gpu) -> list[str]:
    major, minor = gpu.compute_capability
    lines = [
        f"cuda:{gpu.index:<9} {gpu.name}, compute capability {major}.{minor}, "
        f"{gpu.multiprocessors} SMs, {gpu.copy_engines} copy engines",
        f"               {gpu.uuid}, PCI {gpu.pci_bus_id}",
    ]
    if gpu.problem:
        return [*lines, f"               cannot be used: {gpu.problem}"]
    gib = 1 << 30
    peers = ", ".join(f"cuda:{peer}" for peer in gpu.peers) or "none"
    abilities = [
        f"pages of {gpu.granularity >> 10} KiB"
        + (
            f" ({gpu.recommended_granularity >> 10} KiB advised)"
            if gpu.recommended_granularity != gpu.granularity
            else ""
        ),
        "exportable" if gpu.exportable else "not exportable",
        "GPUDirect RDMA" if gpu.rdma else "no GPUDirect RDMA",
        f"peers {peers}",
    ]
    return [
        *lines,
        f"               {gpu.memory_free / gib:.1f} of {gpu.memory_total / gib:.1f} GiB free",
        f"               {'; '.join(abilities)}",
    ]


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple, set)):
        return "/".join(map(str, value))
    return str(value)
