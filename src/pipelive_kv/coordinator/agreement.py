"""Whether the stages and the scheduler agree on what is there, and what may be wished for."""

from __future__ import annotations

from pipelive_kv.coordinator.recovery import Survey
from pipelive_kv.errors import InvalidArgumentError, ProtocolError
from pipelive_kv.messages import StageInfo
from pipelive_kv.placement import Placement, whole_stacks


def check_agreement(found: Survey, target: Placement) -> Placement:
    """The wish with an entry for every rank there is or was.

    Raises:
        ProtocolError: a stage holds other layers than the scheduler believes, or runs another
            epoch.
        InvalidArgumentError: ``target`` cuts a stack in two, or puts layers where no stage is.
    """
    scheduler = found.scheduler
    ranks = {info.rank for info in found.stages}
    size = max(max(ranks) + 1, len(scheduler.stages), target.num_stages)
    current, wanted = Placement(scheduler.stages).padded(size), target.padded(size)
    for info in found.stages:
        expected = current.layers_of(info.rank)
        if info.layers != expected or info.epoch != scheduler.epoch:
            raise ProtocolError(
                f"stage {info.rank} holds layers {info.layers} in epoch {info.epoch}, the "
                f"scheduler expects {expected} in epoch {scheduler.epoch}"
            )
        whole_stacks([wanted], info.stack)
    for rank, layers in enumerate(wanted.stages):
        if layers and rank not in ranks:
            raise InvalidArgumentError(
                f"placement {target} puts {len(layers)} layers on stage {rank}, expected stages "
                f"that are there: {', '.join(map(str, sorted(ranks)))}"
            )
    return wanted


def check_joined(found: Survey, rank: int) -> bool:
    """Whether stage ``rank`` has begun its first step, and so takes part.

    Raises:
        ProtocolError: it holds a layer, or is of another model or memory order than the others.
    """
    joined = next(info for info in found.stages if info.rank == rank)
    others = [info for info in found.stages if info.rank != rank]
    if joined.layers:
        raise ProtocolError(f"stage {rank} joins with layers {joined.layers}, expected none")
    for info in others:
        if _shape(info) != _shape(joined):
            raise ProtocolError(
                f"stage {rank} joins with {_shape(joined)}, stage {info.rank} has {_shape(info)}"
            )
    return joined.epoch == found.scheduler.epoch


def _shape(info: StageInfo) -> dict[str, object]:
    spec = {key: value for key, value in info.spec.items() if key != "order"}
    return {**spec, "stack": info.stack, "max_blocks": info.max_blocks}
