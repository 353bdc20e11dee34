"""Destinations of a load: the bytes of a tensor in host memory, whoever owns it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipelive_kv.weights.source import TensorSpec, WeightsError

__all__ = ["writable_bytes"]


def writable_bytes(target: Any, spec: TensorSpec) -> npt.NDArray[np.uint8]:
    """Return the memory of `target` as writable bytes, without a copy.

    Args:
        target: a `WeightTensor`, NumPy array or torch tensor, contiguous, in host memory.
        spec: what it must be; bytes of the right number are accepted for any dtype.

    Raises:
        WeightsError: if it does not fit `spec`.
    """
    if hasattr(target, "data_bytes"):  # a WeightTensor
        raw = target.data_bytes
        if raw is None:
            raise WeightsError(f"{spec}: the target is not in host memory")
    else:
        raw = _array_bytes(target, spec)
    if raw.nbytes != spec.nbytes:
        raise WeightsError(f"{spec}: the target holds {raw.nbytes} bytes, expected {spec.nbytes}")
    if not raw.flags.writeable:
        raise WeightsError(f"{spec}: the target is read-only")
    return raw  # type: ignore[no-any-return]


def _array_bytes(target: Any, spec: TensorSpec) -> Any:
    if isinstance(target, np.ndarray):
        dtype, array = target.dtype.name, target
    elif type(target).__module__.split(".")[0] == "torch":
        import torch  # noqa: PLC0415

        dtype = str(target.dtype).removeprefix("torch.")
        if not target.is_contiguous():
            raise WeightsError(f"{spec}: the target is not contiguous")
        array = target.detach().reshape(-1).view(torch.uint8).numpy()
        if tuple(target.shape) != spec.shape:
            raise WeightsError(f"{spec}: the target has shape {list(target.shape)}")
    else:
        raise WeightsError(
            f"{spec}: the target is a {type(target).__name__}; "
            "expected a WeightTensor, a NumPy array or a torch tensor"
        )
    # NumPy has no bfloat16 and no float8: their bits come as unsigned integers.
    if dtype != spec.dtype and not dtype.startswith("uint"):
        raise WeightsError(f"{spec}: the target is {dtype}")
    if not array.flags.c_contiguous:
        raise WeightsError(f"{spec}: the target is not contiguous")
    return array.reshape(-1).view(np.uint8)
