"""What this build contains and which CUDA driver it finds, for reports and bug reports."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from pipelive_kv import _core, cuda_arrays

DRIVER_LIBRARY = "libcuda.so.1"


@dataclass(frozen=True)
class CudaDriver:
    """The CUDA driver as it was found when asked.

    Attributes:
        version: the newest CUDA version that the driver supports, such as "12.8"; None where the
            driver cannot be used.
        devices: the names of the devices, by number.
        problem: why no device can be used; empty where one can.
    """

    version: str | None
    devices: tuple[str, ...]
    problem: str


@dataclass(frozen=True)
class BuildInfo:
    """How the compiled core was built.

    Attributes:
        version: of pipelive_kv.
        compiler: the C++ compiler and its version.
        build_type: CMake's, such as "Release".
        sanitizers: as in ``-fsanitize=``; empty for none.
        baseline_isa: what the whole library requires of the processor.
        attention_isa: the instruction sets that this processor and build have attention kernels
            for, slowest first; the last one is used.
        cuda_compiler: the version of the nvcc that compiled the kernels; empty where none did.
        cuda_archs: what the kernels were compiled for; "sm_90" is machine code, "compute_100" PTX.
        cuda_kernels: the embedded kernel files, by name.
        cuda_fatbin_bytes: their size together.
        kernel_problem: why the first CUDA device has no kernels; empty where this build carries
            them, where NVRTC compiles them instead, or where there is no device.
        driver: the CUDA driver on this machine.
    """

    version: str
    compiler: str
    build_type: str
    sanitizers: str
    baseline_isa: tuple[str, ...]
    attention_isa: tuple[str, ...]
    cuda_compiler: str
    cuda_archs: tuple[str, ...]
    cuda_kernels: tuple[str, ...]
    cuda_fatbin_bytes: int
    kernel_problem: str
    driver: CudaDriver

    @property
    def cuda_compiled(self) -> bool:
        """Whether CUDA kernels are part of this build."""
        return bool(self.cuda_kernels)

    @property
    def cuda_missing(self) -> str:
        """What keeps this build from using a CUDA device here; empty if nothing does."""
        if self.driver.problem or not self.kernel_problem:
            return self.driver.problem
        return (
            "CUDA kernels are not in this build, which was compiled without nvcc, and cannot be "
            f"compiled here: {self.kernel_problem}"
        )

    def __str__(self) -> str:
        """Lay the fields out one to a line."""
        rows = {field.name: getattr(self, field.name) for field in fields(self)}
        driver = rows.pop("driver")
        rows["cuda_driver"] = driver.version or f"none ({driver.problem})"
        rows["cuda_devices"] = driver.devices
        shown = {k: ", ".join(v) if isinstance(v, tuple) else v for k, v in rows.items()}
        width = max(map(len, shown))
        return "\n".join(f"{k:{width}}  {'-' if v == '' else v}" for k, v in shown.items())


def build_info(*, driver_library: str = DRIVER_LIBRARY) -> BuildInfo:
    """Tell how this build was made and look for the CUDA driver.

    A driver that is missing or broken is no error: the result says what is wrong with it.

    Args:
        driver_library: name or path of the driver's shared library, as for ``dlopen``.
    """
    built = _core.build_info()
    probed = _core.cuda_probe(driver_library)
    version = probed["version"]
    kernel_problem = ""
    if not built["cuda_kernels"] and probed["devices"]:
        cuda_arrays.offer_compilers()
        kernel_problem = _core.cuda_report(driver_library)["devices"][0]["kernel_problem"]
    return BuildInfo(
        version=built["version"],
        compiler=built["compiler"],
        build_type=built["build_type"],
        sanitizers=built["sanitizers"],
        baseline_isa=tuple(built["baseline_isa"]),
        attention_isa=tuple(built["attention_isa"]),
        cuda_compiler=built["cuda_compiler"],
        cuda_archs=tuple(built["cuda_archs"]),
        cuda_kernels=tuple(built["cuda_kernels"]),
        cuda_fatbin_bytes=built["cuda_fatbin_bytes"],
        kernel_problem=kernel_problem,
        driver=CudaDriver(
            version=None if version is None else f"{version // 1000}.{version % 1000 // 10}",
            devices=tuple(probed["devices"]),
            problem=probed["problem"],
        ),
    )


def cuda_scale(
    values: npt.ArrayLike,
    factor: float,
    *,
    device: int = 0,
    driver_library: str = DRIVER_LIBRARY,
) -> npt.NDArray[np.float32]:
    """Multiply on a CUDA device, to check that kernels of this build run there.

    Args:
        values: numbers of any shape; taken as float32.
        factor: what to multiply them by.
        device: the CUDA device's number.
        driver_library: name or path of the driver's shared library, as for ``dlopen``.

    Returns:
        A new float32 array of the same shape.

    Raises:
        InvalidArgumentError: there is no device of that number.
        DeviceError: the driver or the kernels are missing, or a driver call failed.
        OutOfMemoryError: the device has too little memory left.
    """
    cuda_arrays.offer_compilers()
    result: npt.NDArray[np.float32] = _core.cuda_scale(values, factor, device, driver_library)
    return result
