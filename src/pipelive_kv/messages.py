"""What the coordinator, the scheduler and the stages say to each other.

Every message is a msgspec struct, so a message with an unknown field, a missing field or a field of
another type is refused when it is decoded. A request is answered by exactly one reply.
"""

from __future__ import annotations

from typing import Any

import msgspec

Layers = tuple[int, ...]
Stages = tuple[Layers, ...]


class Stamp(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What goes along with each step's own message, from the scheduler to every stage."""

    seq: int
    """The step's number; every stage runs the steps in this order."""
    epoch: int
    """The epoch whose placement the step runs."""
    aborted: int = -1
    """The highest epoch that was given up."""
    resize: int = 0
    """How many times the capacity has shrunk so far."""
    capacity: int = 0
    """Block ids below this number are resident while the step runs."""
    moves: tuple[tuple[int, int], ...] = ()
    """Where this step brings a new ``resize``: (old, new) block copies to make before it runs."""
    needs: int | None = None
    """The last step whose writes this one may read or overwrite; None: the one before it."""


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Base of everything that travels inside a request or a reply."""


class Done(Body, frozen=True):
    """The reply that says nothing but that the request was carried out."""


# -- to a stage ------------------------------------------------------------------------------------


class Describe(Body, frozen=True):
    """Ask a stage what it is and what it holds; answered by :class:`StageInfo`."""


class StageInfo(Body, frozen=True):
    """What a stage is, holds and may hold."""

    rank: int
    epoch: int
    stages: Stages
    layers: Layers
    capacity: int
    max_blocks: int
    budget_bytes: int
    used_bytes: int
    peak_bytes: int
    spec: dict[str, Any]
    layer_bytes: tuple[int, ...]
    """Weight bytes of every layer of the model as this stage holds them, rounded up to pages."""
    stack: int
    process: int
    last_seq: int
    state: str
    """Of the stage's machine in :mod:`pipelive_kv.protocol`."""
    given_up: int
    """The highest epoch that the stage refuses because it was given up."""
    session: int = -1
    """The epoch that the stage takes part in, -1 for none."""
    session_stages: Stages = ()
    """The placement of that epoch."""
    session_from: Stages = ()
    """The placement that it takes over from."""
    other_bytes: int = 0
    """What of the budget is taken by neither KV nor weights of layers."""
    block_bytes: int = 1
    """Of one layer's block."""
    page_bytes: int = 1


class Admit(Body, frozen=True):
    """Ask how many blocks fit while, and after, the stage takes part in a reconfiguration."""

    epoch: int
    stages: Stages


class Admitted(Body, frozen=True):
    """How many blocks fit; ``reason`` says what would be missing where nothing fits."""

    during: int
    after: int
    reason: str = ""


class AwaitResize(Body, frozen=True):
    """Wait until the stage has applied resize number ``resize``."""

    resize: int
    timeout: float


class AwaitStep(Body, frozen=True):
    """Wait until the stage has completed step ``seq``."""

    seq: int
    timeout: float


class Prepare(Body, frozen=True):
    """Make room for the layers that the stage gains and listen for their KV."""

    epoch: int
    stages: Stages
    incoming: tuple[tuple[int, Layers], ...]
    """(source stage, layers) for every move towards this stage."""
    weights: str
    """Where the weights come from: ``source`` (the stage's own WeightSource) or ``peer``."""
    verify: bool
    timeout: float
    lease: bool = False
    """The old placement may be taken up again: log what is written from the vote on."""
    resume: bool = False
    """Take the layers up that were kept for that; all but what was written since is there."""


class Prepared(Body, frozen=True):
    """Where the stage listens: one address per incoming move, in the order of the request."""

    addresses: tuple[str, ...]


class Connect(Body, frozen=True):
    """Connect to the targets of the layers that the stage gives away."""

    epoch: int
    stages: Stages
    outgoing: tuple[tuple[int, Layers, str], ...]
    """(target stage, layers, address) for every move away from this stage."""
    weights: str
    verify: bool
    rate_limit: float
    """Bytes per second while tokens are generated, 0 for no limit."""
    timeout: float
    resume: bool = False
    """The targets have kept the layers: what the log holds is all that they lack."""


class StartCopy(Body, frozen=True):
    """Start the bulk copy of the live blocks; rounds of patches follow by themselves."""

    epoch: int
    live: tuple[tuple[int, int], ...]
    """Live block ids as (first, count) runs."""
    max_stop_ms: float
    max_rounds: int
    timeout: float


class LoadWeights(Body, frozen=True):
    """Load the weights of the gained layers and let the engine prepare them."""

    epoch: int
    timeout: float


class AwaitConverged(Body, frozen=True):
    """Wait until the predicted stop time is below the limit."""

    epoch: int
    timeout: float


class Converged(Body, frozen=True):
    """What a source predicts for the switchover."""

    predicted_stop_ms: float
    """The sum of the three parts that follow the counts."""
    rounds: int
    lag_steps: int
    fixed_ms: float = 0.0
    bytes_ms: float = 0.0
    records_ms: float = 0.0
    stalled: bool = False
    """Not converged: the last rounds have brought no gain, since steps write as fast."""


class WriteThrough(Body, frozen=True):
    """From now on send each step's slots as soon as the step has ended; answered once that runs."""

    epoch: int
    timeout: float


class Arm(Body, frozen=True):
    """Ask for the stage's vote: can it activate without allocating and without failing?"""

    epoch: int
    timeout: float


class Commit(Body, frozen=True):
    """Tell that the epoch is committed and runs from step ``step`` on."""

    epoch: int
    step: int


class AwaitSwitched(Body, frozen=True):
    """Wait until the stage runs the new placement and its transfers are over."""

    epoch: int
    timeout: float


class RoundRecord(Body, frozen=True):
    """One round of a source: round 0 is the bulk copy."""

    number: int
    through_seq: int
    slots: int
    bytes: int
    records: int
    start_ns: int
    end_ns: int
    """When the targets had applied it; in write-through, but for the last one: when it was sent."""
    busy_s: float
    lag_steps: int
    predicted_stop_ms: float = 0.0
    """What the stop would have been predicted to take after this round."""
    write_through: bool = False
    """Whether the round is what one step has written, sent at the step's end."""


class Switched(Body, frozen=True):
    """What the switchover cost on one stage; times are of the host's monotonic clock."""

    rank: int
    step: int
    last_old_end_ns: int
    first_new_start_ns: int
    activate_s: float
    gate_s: float
    predicted_stop_ms: float
    rounds: tuple[RoundRecord, ...]
    transport: str
    verified_slots: int
    tail_s: float = 0.0
    """From the end of the last old step here until its writes were applied at every target."""
    predicted: Converged | None = None
    """What the source predicted last before the switchover, with ``predicted_stop_ms`` as its sum;
    None where the stage is no source."""
    reconnects: int = 0
    """Connections that were lost after the vote and made again."""


class Release(Body, frozen=True):
    """Drop the layers that the stage gave away."""

    epoch: int
    timeout: float
    keep: bool = False
    """Keep them for a lease; the next epoch takes them up again, or drops them."""


class Grow(Body, frozen=True):
    """Raise the number of resident blocks to ``capacity``, after resize number ``resize``."""

    capacity: int
    resize: int
    timeout: float


class Abort(Body, frozen=True):
    """Give the epoch up: everything as before. Answered when nothing of it is left."""

    epoch: int
    reason: str
    timeout: float


class Observe(Body, frozen=True):
    """Ask how the transfer stands; answered by :class:`Progress`."""


class Progress(Body, frozen=True):
    """How a stage stands at this moment."""

    rank: int
    epoch: int
    seq: int
    rounds: int
    bytes_sent: int
    lag_steps: int
    used_bytes: int
    held_bytes: int
    peak_bytes: int
    capacity: int


# -- to the scheduler ------------------------------------------------------------------------------


class DescribeScheduler(Body, frozen=True):
    """Ask the scheduler for its state; answered by :class:`SchedulerInfo`."""


class SchedulerInfo(Body, frozen=True):
    """The state of the scheduler."""

    epoch: int
    newest_epoch: int
    """The highest epoch ever tried, committed or not."""
    stages: Stages
    next_seq: int
    capacity: int
    live: int
    state: str
    """Of the scheduler's machine in :mod:`pipelive_kv.protocol`."""
    resize: int
    pending: int = -1
    """The epoch for which something is under way here, -1 for none."""
    capacity_before: int = -1
    """What the capacity was before the pending epoch lowered it, -1 where it did not."""
    switch_hold_s: float = 0.0
    """How long the last switchover waited for word of its decision."""


class Shrink(Body, frozen=True):
    """Lower the capacity; answered by :class:`Resized` once a step carries it."""

    epoch: int
    capacity: int
    timeout: float


class Resized(Body, frozen=True):
    """The number of the resize that stages have to apply."""

    resize: int
    capacity: int
    moved: int


class RaiseCapacity(Body, frozen=True):
    """Hand out ids up to ``capacity`` from now on: every stage has mapped them."""

    capacity: int


class ListLive(Body, frozen=True):
    """Ask which block ids are live; answered by :class:`LiveBlocks`."""


class LiveBlocks(Body, frozen=True):
    """Live block ids as (first, count) runs, as they were before step ``next_seq``."""

    runs: tuple[tuple[int, int], ...]
    next_seq: int


class Hold(Body, frozen=True):
    """Stop stamping steps (a stop-and-copy reconfiguration); answered by :class:`Held`."""

    epoch: int
    timeout: float


class Held(Body, frozen=True):
    """The last step that was stamped."""

    last_seq: int


class Throttle(Body, frozen=True):
    """Ask the engine to write less: ``share`` of what it otherwise would, until the outcome."""

    epoch: int
    share: float
    """Above 0, up to 1 for all of it."""
    timeout: float
    """Seconds after which the engine goes on as before, whatever has become of the epoch."""


class Propose(Body, frozen=True):
    """Ask for a switchover step; the scheduler does not stamp it before it knows the outcome."""

    epoch: int
    stages: Stages
    record: str
    """The directory of the decision record, where the scheduler asks if nobody tells it.

    Empty where the record is no directory; the scheduler was given its own way to it then.
    """
    margin: int
    timeout: float


class Proposed(Body, frozen=True):
    """The switchover step."""

    step: int


class Settle(Body, frozen=True):
    """Tell the scheduler the outcome of an epoch."""

    epoch: int
    commit: bool


Request = (
    Describe
    | Admit
    | AwaitResize
    | AwaitStep
    | Prepare
    | Connect
    | StartCopy
    | LoadWeights
    | AwaitConverged
    | WriteThrough
    | Arm
    | Commit
    | AwaitSwitched
    | Release
    | Grow
    | Abort
    | Observe
    | DescribeScheduler
    | Shrink
    | RaiseCapacity
    | ListLive
    | Hold
    | Throttle
    | Propose
    | Settle
)

Answer = (
    Done
    | StageInfo
    | Admitted
    | Prepared
    | Converged
    | Switched
    | Progress
    | SchedulerInfo
    | Resized
    | LiveBlocks
    | Held
    | Proposed
)
