"""Append to a paged KV cache, and attention over it, on the device that the cache lies on.

Both work on any KV tensor ``[block, kv_head, 2, token, head_dim]`` (keys at index 0 of the third
axis, values at 1): a layer of a :class:`~pipelive_kv.kv.KVPool`, or any tensor with ``__dlpack__``
whose last axis is contiguous, in whatever memory order.

On a GPU the kernels are part of the build, or compiled at first use by NVRTC (of torch, of the
package nvidia-cuda-nvrtc-cu12 or of a CUDA toolkit) and kept in the user's cache folder. So the
first call for a dtype and head dim may take seconds, and must not be the one that a CUDA graph
captures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, overload

from pipelive_kv import _core, cuda_arrays
from pipelive_kv.errors import InvalidArgumentError

if TYPE_CHECKING:
    from pipelive_kv.tracker import DirtyTracker

__all__ = ["append", "available_isas", "check_block_tables", "paged_attention"]


class Tensor(Protocol):
    """What lends its memory through DLPack: torch and numpy arrays, layer views."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

    def __dlpack_device__(self) -> Any: ...


Array = TypeVar("Array", bound=Tensor)


def available_isas() -> tuple[str, ...]:
    """The instruction sets that this processor can run, slowest first.

    A subset of ``portable``, ``avx2``, ``avx512`` and ``avx512_bf16``; the last one is used where
    ``isa`` is not given.
    """
    return tuple(_core.attention_isas())


def append(
    kv: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    *,
    isa: str | None = None,
    stream: Any = None,
    marks: DirtyTracker | None = None,
) -> None:
    """Write the keys and values of tokens to their slots.

    Where ``kv`` lies on a GPU, so do all arguments, and the work is given to ``stream`` and not
    waited for; it may be captured into a CUDA graph. The tensors must stay alive until it is done
    (torch: ``record_stream``, where ``stream`` is not the one they were made in). Slots that are
    out of range are skipped there, which blocks are mapped is not looked at, and of two tokens
    with one slot either may stay.

    Args:
        kv: the cache, ``[blocks, kv_heads, 2, block_size, head_dim]``; float32, float16 or
            bfloat16; head_dim a multiple of 8 up to 256.
        key: ``[tokens, kv_heads, head_dim]``, last axis contiguous; the dtype of ``kv``, or
            float32, which is rounded to nearest even.
        value: like ``key``.
        slots: int64 ``[tokens]``; ``block_id * block_size + offset``, or -1 to skip the token. Of
            two tokens with one slot the later stays.
        isa: one of :func:`available_isas`; for tests, on the CPU.
        stream: on a GPU, a stream of torch or cupy or its handle; None: the current stream of the
            library that ``key`` is of, or CUDA's default stream. The pool of a layer keeps a stream
            object until :meth:`~pipelive_kv.kv.KVPool.release_stream`, so do not make one per call.
            A handle must stay valid until then.
        marks: on a GPU, a tracker with this device: the slots are marked in the same launch, for
            the step of its last ``mark`` in this stream. One layer's append per step is enough.

    Raises:
        InvalidArgumentError: shapes or dtypes do not agree, a slot lies outside of ``kv``, or
            memory overlaps. Nothing is written.
        NotResidentError: a slot's block is not mapped. Nothing is written.
    """
    if cuda_arrays.on_gpu(kv):
        cuda_arrays.offer_compilers()
    queue = cuda_arrays.queue_of(stream, key, value, slots)
    with queue.device:
        _core.attention_append(
            kv,
            key,
            value,
            slots,
            isa,
            queue.stream,
            None if marks is None else marks.marks,
            queue.ordered,
        )


@overload
def paged_attention(
    query: Array,
    kv: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    query_start: Tensor | None = ...,
    window: int = ...,
    soft_cap: float = ...,
    out: Array | None = ...,
    return_lse: Literal[False] = ...,
    block_map: Tensor | None = ...,
    threads: int | None = ...,
    isa: str | None = ...,
    stream: Any = ...,
) -> Array: ...


@overload
def paged_attention(
    query: Array,
    kv: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    query_start: Tensor | None = ...,
    window: int = ...,
    soft_cap: float = ...,
    out: Array | None = ...,
    return_lse: Literal[True],
    block_map: Tensor | None = ...,
    threads: int | None = ...,
    isa: str | None = ...,
    stream: Any = ...,
) -> tuple[Array, Array]: ...


def paged_attention(
    query: Array,
    kv: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    query_start: Tensor | None = None,
    window: int = 0,
    soft_cap: float = 0.0,
    out: Array | None = None,
    return_lse: bool = False,
    block_map: Tensor | None = None,
    threads: int | None = None,
    isa: str | None = None,
    stream: Any = None,
) -> Array | tuple[Array, Array]:
    """Causal attention of the last tokens of sequences over their paged KV.

    A token's result depends bit for bit on its query, the KV it attends to and its position alone:
    not on ``threads``, the other sequences, the chunk it comes in, block ids or memory order.

    Where ``kv`` lies on a GPU, so do query and out, and the work is given to ``stream`` and not
    waited for. Block tables, lengths, query_start and block_map are either all on that GPU or all
    in host memory. Those of the host are checked as on the CPU, residency included, and copied.
    Those of the GPU are not looked at by the host: a CUDA graph that captured the call goes on
    working when they change. What they say is then the caller's duty: rows of a sequence whose
    numbers contradict each other, and rows that meet a block id out of range, become NaN, and a
    block that is not resident is read all the same; :func:`check_block_tables` finds such ids.
    16-bit queries are multiplied on tensor cores, float32 ones in float32.

    Args:
        query: ``[tokens, q_heads, head_dim]``, the sequences one after the other; the dtype of
            ``kv``, or float32; q_heads a multiple of kv_heads.
        kv: the cache, see :func:`append`; the KV of the query tokens is in it already.
        block_tables: int32 ``[seqs, max_blocks]``. Only entries whose block holds a token that is
            attended to are looked at.
        seq_lens: int32 ``[seqs]``, query tokens included; 0 for an empty sequence.
        scale: of the scores, as in ``1 / sqrt(head_dim)``.
        query_start: int32 ``[seqs + 1]``, ascending from 0: sequence i has the query rows from
            ``query_start[i]`` to ``query_start[i + 1]``. None: one row each.
        window: a token attends to itself and the ``window - 1`` before it; 0: to all before it.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``; 0: they do not.
        out: where the result goes, like ``query``; may be ``query`` itself. None: a new array.
        return_lse: also return the natural log-sum-exp of the scores.
        block_map: int32; entry i is the physical block of block id i. None: the identity.
        threads: how many to use at most, 1 to 1024. None: as many as the process may.
        isa: one of :func:`available_isas`; for tests on the CPU.
        stream: on a GPU, a stream of torch or cupy or its handle; None: the current stream of the
            library that ``query`` is of. Memory that the call makes belongs to it.

    Returns:
        The result, of ``query``'s kind (torch, numpy or cupy), shape and dtype; with ``return_lse``
        also a float32 array ``[tokens, q_heads]``. Rows of empty sequences and rows behind the last
        sequence are 0, with a log-sum-exp of -inf.

    Raises:
        InvalidArgumentError: an argument's shape, dtype or value is out of range; the message names
            it. Nothing is written.
        NotResidentError: a block that would be read is not mapped. Nothing is written.
        DeviceError: the GPU's kernels are missing, or its driver refused.
        TypeError: an argument lends no memory, or ``query`` is neither torch, numpy nor cupy and
            something would have to be made.
    """
    gpu = cuda_arrays.of(query, stream)
    if gpu is not None:
        with gpu.in_stream():
            made, made_lse = _attend_on_gpu(
                gpu,
                query,
                kv,
                (block_tables, seq_lens, query_start, block_map),
                out,
                return_lse,
                (scale, window, soft_cap, threads, isa),
            )
        return (made, made_lse) if return_lse else made
    if out is None:
        out = _empty_like(query, float32=False)
    lse = _empty_like(query, float32=True) if return_lse else None
    _core.attention_forward(
        query,
        kv,
        block_tables,
        seq_lens,
        out,
        lse,
        scale,
        query_start,
        window,
        soft_cap,
        block_map,
        threads,
        isa,
        stream,
    )
    return out if lse is None else (out, lse)


def _attend_on_gpu(
    gpu: cuda_arrays.GpuArrays,
    query: Any,
    kv: Tensor,
    tables: tuple[Any, Any, Any, Any],
    out: Any,
    return_lse: bool,
    numbers: tuple[float, int, float, int | None, str | None],
) -> tuple[Any, Any]:
    scale, window, soft_cap, threads, isa = numbers
    block_tables, seq_lens, query_start, block_map = tables
    if not any(cuda_arrays.on_gpu(table) for table in tables):
        _core.attention_validate(
            query,
            kv,
            block_tables,
            seq_lens,
            out,
            scale,
            query_start,
            window,
            soft_cap,
            block_map,
        )
        block_tables, seq_lens, query_start, block_map = (
            None if table is None else gpu.copy_of(table) for table in tables
        )
    if out is None:
        out = gpu.empty(tuple(query.shape), None)
    lse = gpu.empty(tuple(query.shape[:2]), "float32") if return_lse else None
    _core.attention_forward(
        query,
        kv,
        block_tables,
        seq_lens,
        out,
        lse,
        scale,
        query_start,
        window,
        soft_cap,
        block_map,
        threads,
        isa,
        gpu.stream,
        gpu.scratch,
    )
    return out, lse


def check_block_tables(
    query: Tensor,
    kv: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    query_start: Tensor | None = None,
    window: int = 0,
    block_map: Tensor | None = None,
    resident: int | None = None,
    stream: Any = None,
) -> None:
    """Look for what :func:`paged_attention` on a GPU does not check, and wait for the answer.

    For debugging: every block id that the same call would follow is compared, and every sequence's
    numbers.

    Args:
        query: as in :func:`paged_attention`, like the other arguments of these names; all of them
            on the GPU.
        kv: see ``query``.
        block_tables: see ``query``.
        seq_lens: see ``query``.
        query_start: see ``query``.
        window: see ``query``.
        block_map: see ``query``.
        resident: blocks from this one on may not be read. None: what is resident now, for a layer
            of a pool; else all of ``kv``.
        stream: see ``query``.

    Raises:
        InvalidArgumentError: something is wrong; the message names the first place, and how many
            there are.
        TypeError: ``query`` is neither a torch nor a cupy array on a GPU.
    """
    gpu = cuda_arrays.of(query, stream)
    if gpu is None:
        raise TypeError("query is not on a GPU; on the CPU paged_attention checks by itself")
    with gpu.in_stream():
        report = gpu.copy_of([0, -1])
        _core.attention_check_tables(
            query,
            kv,
            block_tables,
            seq_lens,
            query_start,
            window,
            block_map,
            resident,
            report,
            gpu.handle,
        )
        count, first = report.tolist()
    if count == 0:
        return
    seq, index = first >> 32, first & 0xFFFFFFFF
    if index == 0xFFFFFFFF:
        place = f"seq_lens[{seq}] is out of range or contradicts query_start"
    else:
        place = f"block_tables[{seq}, {index}] leads to no resident block"
    raise InvalidArgumentError(f"{place}; {count} entries are wrong")


def _empty_like(query: Any, *, float32: bool) -> Any:
    """A new array of query's kind: its shape and dtype, or its first two axes in float32."""
    kind = type(query)
    module = kind.__module__.partition(".")[0]
    shape = tuple(query.shape[:2]) if float32 else tuple(query.shape)
    if module == "torch" or any(base.__module__ == "torch" for base in kind.__mro__):
        import torch  # noqa: PLC0415  the caller has it, and only then is it needed

        return query.new_empty(shape, dtype=torch.float32 if float32 else query.dtype)
    if module == "numpy":
        import numpy as np  # noqa: PLC0415

        return np.empty(shape, dtype=np.float32 if float32 else query.dtype)
    raise TypeError(
        f"query is a {kind.__module__}.{kind.__qualname__}, expected a torch tensor or "
        "a numpy array"
    )
