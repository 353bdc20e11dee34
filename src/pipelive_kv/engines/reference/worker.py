"""A stage process: receives steps, runs its layers, passes hidden states on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq

from pipelive_kv.engines.reference.config import EngineConfig
from pipelive_kv.engines.reference.messages import (
    Failed,
    Meet,
    Met,
    Ready,
    Step,
    StepDone,
    Stop,
    ToStage,
)
from pipelive_kv.errors import InvalidArgumentError
from pipelive_kv.placement import Placement

__all__ = ["Launch", "main", "results_address", "steps_address"]


_SWITCH_INTERVAL = 2e-4  # seconds


@dataclass(frozen=True)
class Launch:
    """What a stage process is started with.

    Attributes:
        directory: private folder for sockets and the rendezvous file.
        control: address of the coordinator; empty if there is none.
        key: `ControlKey.to_bytes()`.
        placement: that is served; the engine's first one, unless the stage joins later.
        capacity: block ids that are resident.
        joins: whether the stage joins a pipeline that runs already; it holds no layer then.
    """

    config: EngineConfig
    rank: int
    directory: str
    control: str
    key: bytes
    placement: Placement
    capacity: int
    joins: bool = False


def steps_address(directory: str, rank: int) -> str:
    """Where a stage receives its steps."""
    return f"ipc://{directory}/steps-{rank}"


def results_address(directory: str) -> str:
    """Where the driver receives results."""
    return f"ipc://{directory}/results"


def main(launch: Launch) -> None:
    """Run a stage until it is told to stop, or the driver has gone; the process's entry point."""
    # Ctrl-C reaches every process of a terminal; the driver is the one that ends the stages.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Before torch is imported: gloo is to listen on loopback alone, and processes that share a few
    # cores lose most of their time when each starts a thread per core.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["OMP_NUM_THREADS"] = str(launch.config.threads)
    # The engine's thread asks for the interpreter back after each call that gave it up; by default
    # a thread of the control plane may keep it for 5 ms, which is longer than a switchover takes.
    sys.setswitchinterval(_SWITCH_INTERVAL)
    context = zmq.Context()
    results = context.socket(zmq.PUSH)
    results.connect(results_address(launch.directory))
    encoder = msgspec.msgpack.Encoder()
    try:
        worker = _Worker(launch)
        try:
            results.send(encoder.encode(Ready(launch.rank)))
            for message in _messages(context, launch):
                if isinstance(message, Meet):
                    worker.meet(message, lambda met: _tell(context, launch, met))
                else:
                    results.send(encoder.encode(worker.run(message)))
        finally:
            worker.close()
    except Exception as error:
        trace = traceback.format_exc()
        results.send(encoder.encode(Failed(launch.rank, f"{type(error).__name__}: {error}", trace)))
        raise SystemExit(1) from None
    finally:
        results.close(linger=2000)
        context.destroy(linger=0)


def _tell(context: zmq.Context[Any], launch: Launch, met: Met) -> None:
    """Send from another thread: it needs a socket of its own."""
    with context.socket(zmq.PUSH) as socket:
        socket.linger = 2000
        socket.connect(results_address(launch.directory))
        socket.send(msgspec.msgpack.encode(met))


def _messages(context: zmq.Context[Any], launch: Launch) -> Any:
    """Yield steps and meetings until a Stop comes or the driver's process is gone."""
    socket = context.socket(zmq.PULL)
    socket.connect(steps_address(launch.directory, launch.rank))
    decoder = msgspec.msgpack.Decoder(ToStage)
    parent = multiprocessing.parent_process()
    while True:
        if not socket.poll(500):
            if parent is not None and not parent.is_alive():
                return
            continue
        message = decoder.decode(socket.recv())
        if isinstance(message, Stop):
            return
        yield message


def _device(name: str, rank: int) -> Any:
    """The torch device of a stage, made current; its arithmetic is float32 where that is asked."""
    import torch  # noqa: PLC0415

    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InvalidArgumentError(f"device is {name!r}; torch sees no GPU here")
    index = torch.device(name).index
    if index is None:
        index = rank % torch.cuda.device_count()
    torch.cuda.set_device(index)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", index)


class _Worker:
    """The stage's share of the model, its memory, and its connections to its neighbours."""

    def __init__(self, launch: Launch) -> None:
        import torch  # noqa: PLC0415

        from pipelive_kv.control import ControlEndpoint, ControlKey  # noqa: PLC0415
        from pipelive_kv.engines.reference.groups import Groups  # noqa: PLC0415
        from pipelive_kv.engines.transformers import (  # noqa: PLC0415
            TransformersModel,
            TransformersStage,
        )
        from pipelive_kv.kv import KVPool  # noqa: PLC0415
        from pipelive_kv.memory import PagePool  # noqa: PLC0415
        from pipelive_kv.stage import Stage  # noqa: PLC0415
        from pipelive_kv.weights import WeightArena  # noqa: PLC0415

        config = launch.config
        self._config, self._rank = config, launch.rank
        torch.set_num_threads(config.threads)
        self._groups = Groups(
            launch.directory,
            launch.rank,
            timeout=config.step_timeout,
            max_sent=2 * config.lanes,
        )
        if not launch.joins:
            self._groups.meet(0, range(launch.placement.num_stages))
        model = TransformersModel(config.model, dtype=config.dtype)
        self._device = _device(config.device, launch.rank)
        self._hidden_size = model.hidden_size
        self._dtype = getattr(torch, config.dtype)
        layers = launch.placement.layers_of(launch.rank)
        source = model.open_weights()
        pages = PagePool(config.budget, page_bytes=config.page_bytes, device=str(self._device))
        arena = WeightArena(pages, source, model.num_layers)
        for layer in layers:
            arena.add(layer)
            arena.load(layer)
        pool = KVPool(
            model.kv_spec(block_size=config.block_size),
            num_layers=model.num_layers,
            layers=layers,
            max_blocks=config.max_blocks,
            capacity=launch.capacity,
            page_pool=pages,
            stack=config.stack,
        )
        self._model = TransformersStage(
            model,
            rank=launch.rank,
            kv=pool.layer,
            weights=source,
            device=self._device,
        )
        self._model.prepare(layers, arena)
        self._model.activate(launch.placement)
        control = None
        if launch.control:
            control = ControlEndpoint(launch.control, ControlKey.from_bytes(launch.key))
        self._stage = Stage(
            pp_rank=launch.rank,
            pp_size=launch.placement.num_stages,
            pool=pool,
            placement=launch.placement,
            hooks=config.wrap_hooks(self._model, pool) if config.wrap_hooks else self._model,
            weights=arena,
            control=control,
            transport=config.transport,
            joins=launch.joins,
        )

    def run(self, step: Step) -> StepDone:
        """Run one step and say how long it took, and with the last layer which tokens it drew."""
        import torch  # noqa: PLC0415

        from pipelive_kv.engines.reference.groups import neighbours  # noqa: PLC0415
        from pipelive_kv.engines.reference.sampling import draw  # noqa: PLC0415
        from pipelive_kv.engines.transformers import StepBatch  # noqa: PLC0415

        begin = time.monotonic()
        slots = torch.tensor(step.slots, dtype=torch.int64)
        held = self._stage.begin(step.stamp, slots)
        start, waited = time.monotonic(), 0.0
        tokens: list[int] = []

        def gate(layer: int) -> None:
            nonlocal waited
            before = time.monotonic()
            held.gate(layer)
            waited += time.monotonic() - before

        # A stage without layers runs every step, but what the others compute does not pass it.
        if step.kind != "empty" and held.layers:
            before, after = neighbours(self._stage.placement.stages, self._rank)
            inputs = self._inputs(step, before)
            start = time.monotonic()
            device = self._device
            batch = StepBatch(
                slots=slots.to(device),
                block_tables=torch.tensor(step.block_tables, dtype=torch.int32, device=device),
                seq_lens=torch.tensor(step.seq_lens, dtype=torch.int32, device=device),
                query_start=torch.tensor(step.query_start, dtype=torch.int32, device=device),
            )
            result = self._model.forward(
                inputs.to(device),
                torch.tensor(step.positions, dtype=torch.int64, device=device),
                batch,
                gate=gate,
                logit_rows=torch.tensor(step.logit_rows, dtype=torch.int64, device=device),
            )
            # Gloo and sampling want host memory; the copy also ends the step's work on a GPU.
            result = result.cpu()
            if after is None:
                tokens = draw(result, step.samples)
            else:
                self._groups.send(step.group, after, result, step.stamp.seq & 0xFFFF)
        self._stage.end(held)
        return StepDone(
            rank=self._rank,
            seq=step.stamp.seq,
            begin=begin,
            start=start,
            end=time.monotonic(),
            gate=waited,
            num_layers=len(held.layers),
            tokens=tokens,
        )

    def close(self) -> None:
        """Leave the control plane."""
        self._stage.close()

    def meet(self, message: Meet, tell: Callable[[Met], object]) -> None:
        """Connect with a new group of processes while steps go on."""
        self._groups.meet_later(
            message.group,
            message.ranks,
            lambda error: tell(Met(self._rank, message.group, error)),
        )

    def _inputs(self, step: Step, before: int | None) -> Any:
        import torch  # noqa: PLC0415

        if before is None:
            return torch.tensor(step.tokens, dtype=torch.int64)
        hidden = torch.empty((len(step.tokens), self._hidden_size), dtype=self._dtype)
        self._groups.receive(step.group, before, hidden, step.stamp.seq & 0xFFFF)
        return hidden
