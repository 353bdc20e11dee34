"""Breaks one rule of the library at a time and shows that a test turns red for each.

Works on a copy of the tracked files in a temporary folder, so the working tree is never touched::

    make mutants                       # all of them, half an hour
    make mutants MUTANTS_ARGS="gate"   # those whose name contains a word

A mutant is one replacement in one file, and the tests that are expected to see it. The exit status
is 1 where a mutant survives, or where the text it replaces is not there (any more).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = "cpp/src/"
PYTHON = "src/pipelive_kv/"


@dataclass(frozen=True)
class Mutant:
    """One rule, broken.

    Attributes:
        name: for choosing it on the command line.
        rule: what is broken, in words.
        file: the file, relative to the repository.
        old, new: the replacement; ``old`` occurs once.
        tests: C++ test programs (``kv_tests``, ``kv_tests:Filter*``) or pytest selections; one of
            them has to fail.
    """

    name: str
    rule: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def compiled(self) -> bool:
        """Whether the core has to be built again."""
        return not self.file.startswith(PYTHON)


MUTANTS = (
    Mutant(
        "seal",
        "a write is collected only after its step was sealed",
        CORE + "tracker/dirty_tracker.cpp",
        "while (!steps_.empty() && steps_.front().sealed && (!held_from_",
        "while (!steps_.empty() && (!held_from_",
        ("tracker_tests",),
    ),
    Mutant(
        "hold",
        "steps from the switchover on stay out of the source's patches",
        CORE + "tracker/dirty_tracker.cpp",
        "(!held_from_ || first_seq_ < *held_from_)",
        "true",
        ("tracker_tests",),
    ),
    Mutant(
        "resume",
        "over a new connection nothing is sent again that the target has applied",
        CORE + "migration/write_through.cpp",
        "std::max(applied(link, rounds_applied), kept_from_)",
        "std::max(link.floor, kept_from_)",
        ("migration_tests:*WritingThrough*",),
    ),
    Mutant(
        "resend",
        "over a new connection everything is sent that the target has not applied",
        CORE + "migration/write_through.cpp",
        "std::max(applied(link, rounds_applied), kept_from_)",
        "kept_from_ + kept_.size()",
        ("migration_tests:*WritingThrough*",),
    ),
    Mutant(
        "lost-unnoticed",
        "a connection that was lost while nobody looked is made again as well",
        PYTHON + "stage/outgoing.py",
        "  # it had failed, and nobody had looked since\n            return True",
        "\n            raise",
        ("tests/chaos/test_lost_connections.py",),
    ),
    Mutant(
        "epoch",
        "a stage applies only what belongs to the live migration",
        CORE + "migration/patch_receiver.cpp",
        "if (header.epoch != options_.epoch) {",
        "if (false) {",
        ("migration_tests", "tests/migration/test_sessions.py"),
    ),
    Mutant(
        "generation",
        "an older generation of a slot never overwrites a newer one",
        "cpp/include/pipelive/migration/generations.hpp",
        "while (at < held.size() && held[at] > generation) ++at;",
        "",
        ("migration_tests",),
    ),
    Mutant(
        "checksum",
        "what was damaged on its way is refused",
        CORE + "transport/wire.cpp",
        "if (crc != crcs.body) {",
        "if (false) {",
        ("transport_tests",),
    ),
    Mutant(
        "verify",
        "the two ends compare the bytes of every live slot",
        CORE + "migration/patch_sender.cpp",
        "if (place < digests_.size() && digests_[place] == own[place]) continue;",
        "continue;",
        ("migration_tests",),
    ),
    Mutant(
        "lost-message",
        "a round counts only when all of its messages have come",
        CORE + "migration/round_ledger.cpp",
        "!(found->second.got == found->second.expected)",
        "false",
        ("migration_tests",),
    ),
    Mutant(
        "early-finish",
        "a session ends only after all of its rounds",
        CORE + "migration/patch_receiver.cpp",
        "if (finish.round != ledger_.num_completed() || ledger_.num_open() != 0) {",
        "if (ledger_.num_open() != 0) {",
        ("migration_tests",),
    ),
    Mutant(
        "range-check",
        "every slot range that arrives is checked before it is used",
        CORE + "migration/patch_receiver.cpp",
        "record.begin > max_slots - record.count",
        "false",
        ("migration_tests",),
    ),
    Mutant(
        "copy-before-check",
        "a peer cannot change records after they were checked",
        CORE + "transport/wire.cpp",
        "    if (copy == nullptr) return bytes.first(size);\n",
        "    if (copy == nullptr || size > kHeaderBytes) return bytes.first(size);\n",
        ("transport_tests",),
    ),
    Mutant(
        "cancel",
        "nothing lands after a cancel",
        CORE + "migration/patch_receiver.cpp",
        "  cancelled_ = true;\n    capacity_changed_.notify_all();",
        "  capacity_changed_.notify_all();",
        ("migration_tests", "tests/migration"),
    ),
    Mutant(
        "fence",
        "no page is unmapped while an operation uses the blocks on it",
        CORE + "kv/residency.cpp",
        "return [this, phase] { return uses_[phase] == 0; }; };",
        "return [this, phase] { return phase < 2 && this != nullptr; }; };",
        ("kv_tests", "tests/kv"),
    ),
    Mutant(
        "event-fence",
        "no page is unmapped before the streams that use the blocks on it have passed",
        CORE + "kv/kv_pool.cpp",
        "events.push_back(device()->record(user));\n  wait_for(events, deadline);",
        "events.push_back(device()->record(user));",
        ("cuda_tests:CudaPoolTest*",),
    ),
    Mutant(
        "step-event",
        "what a step writes is collected only after its event has passed",
        CORE + "tracker/dirty_tracker.cpp",
        "if (!step.event || !step.event->done()) break;",
        "if (!step.event) break;",
        ("tracker_tests",),
    ),
    Mutant(
        "resident",
        "an operation never touches an unmapped page, it raises",
        CORE + "kv/residency.cpp",
        "if (std::cmp_less(id, 0) || std::cmp_greater_equal(id, resident)) {",
        "if (false) {",
        ("kv_tests", "attention_tests"),
    ),
    Mutant(
        "scrub",
        "pages that become KV hold zeros",
        CORE + "memory/arena.cpp",
        "    if (scrubbed) zero_dirty(range, pages);\n",
        "",
        ("memory_tests", "kv_tests"),
    ),
    Mutant(
        "budget",
        "memory in use never exceeds the budget",
        CORE + "memory/page_pool.cpp",
        "if (count > budget_ || used_ > budget_ - count) {",
        "if (count > budget_) {",
        ("memory_tests",),
    ),
    Mutant(
        "quarantine",
        "freed ids wait until every step scheduled before the free has retired",
        CORE + "kv/block_allocator.cpp",
        "const bool wait = after_seq && *after_seq > retired_through_;\n  std::size_t done",
        "const bool wait = false;\n  std::size_t done",
        ("kv_tests",),
    ),
    Mutant(
        "shared-prefix",
        "a shared block is copied before it is written",
        CORE + "kv/block_allocator.cpp",
        "    for (std::size_t i = 0; i < done; ++i) ++at(ids[i]).refcount;\n",
        "",
        ("kv_tests",),
    ),
    Mutant(
        "window",
        "a token attends to its window and to nothing before it",
        CORE + "attention/plan.cpp",
        "tile.kv_begin = std::max<std::int64_t>(0, at - window + 1);",
        "tile.kv_begin = std::max<std::int64_t>(0, at - window + 2);",
        ("attention_tests",),
    ),
    Mutant(
        "gate",
        "a gained layer runs only after the writes that its step reads are there",
        PYTHON + "stage/target.py",
        "        incoming.wait_applied(through, timeout)\n",
        "",
        ("tests/coordination/test_hazard_free.py", "tests/coordination"),
    ),
    Mutant(
        "hazard",
        "a step with a hazard waits for all writes that it can depend on",
        PYTHON + "stage/stage.py",
        "needs = stamp.seq - 1 if stamp.needs is None else stamp.needs",
        "needs = -1",
        ("tests/coordination/test_hazard_free.py", "tests/coordination"),
    ),
    Mutant(
        "hazard-rule",
        "what follows on from a step under way at the switchover is put off",
        PYTHON + "scheduler/retired.py",
        "return self.through < seq < self.first_step",
        "return False",
        ("tests/coordination/test_hazard_free.py",),
    ),
    Mutant(
        "narrow",
        "a step that tells what it touches waits for steps under way that write it",
        PYTHON + "scheduler/in_flight.py",
        "if written is None or not written.isdisjoint(touched):",
        "if written is None:",
        ("tests/coordination/test_hazard_free.py",),
    ),
    Mutant(
        "retired-late",
        "a step being built uses nothing that its stamp does not know to have retired",
        PYTHON + "scheduler/retired.py",
        "return self.builder in (None, threading.get_ident()) and self.settle()",
        "return self.settle()",
        ("tests/coordination/test_scheduler.py",),
    ),
    Mutant(
        "tail",
        "the tail holds every step before the switchover",
        CORE + "migration/write_through.cpp",
        "if (last && sent_through() >= *last) {",
        "if (last && sent_through() >= *last - 1) {",
        ("migration_tests",),
    ),
    Mutant(
        "record",
        "the decision can be recorded only once",
        PYTHON + "record.py",
        "                os.link(name, path)\n",
        "                Path(path).write_bytes(Path(name).read_bytes())\n",
        ("tests/coordination/test_record.py",),
    ),
    Mutant(
        "vote",
        "a stage votes only when its layers are ready",
        PYTHON + "stage/session.py",
        "        if self.target.layers and not self.target.loaded:\n",
        "        if False:\n",
        ("tests/coordination/test_stage_order.py",),
    ),
    Mutant(
        "stamp-order",
        "steps run in the order of their numbers",
        PYTHON + "stage/stage.py",
        "if stamp.seq != self._last_seq + 1 and self._last_seq >= 0:",
        "if False:",
        ("tests/coordination/test_stage_order.py",),
    ),
    Mutant(
        "abort-discards",
        "an abort gives back what the new layers held",
        PYTHON + "coordinator/ending.py",
        "lambda _: Abort(self.epoch, reason, ABORT_TIMEOUT), Done, ABORT_TIMEOUT\n        )\n",
        "lambda _: Abort(self.epoch, reason, ABORT_TIMEOUT), Done, ABORT_TIMEOUT, ()\n        )\n",
        ("tests/coordination/test_giving_up.py", "tests/coordination/test_reconfigure.py"),
    ),
    Mutant(
        "shrink-quarantine",
        "a shrink waits for the steps that may still use freed ids",
        PYTHON + "scheduler/residency.py",
        "        elif self._waits(request):\n            return False\n",
        "",
        ("tests/coordination/test_residency.py",),
    ),
    Mutant(
        "raise-in-stamp",
        "a higher capacity takes effect with a stamp, not beside one",
        PYTHON + "scheduler/residency.py",
        "        state.raise_to = max(state.raise_to, capacity)\n",
        "        state.raise_to = max(state.raise_to, capacity)\n        self._raise()\n",
        ("tests/coordination/test_residency.py",),
    ),
    Mutant(
        "wave-capacity",
        "the capacity stays low between two waves",
        PYTHON + "coordinator/reconfiguration.py",
        "self._after = self.room if wave.is_last else during",
        "self._after = self.room",
        ("tests/coordination/test_wave_moves.py",),
    ),
    Mutant(
        "join-epoch",
        "a stage that joins takes over what the others have been told before",
        PYTHON + "stage/stage.py",
        "            self.fence(stamp.aborted)\n",
        "",
        ("tests/coordination/test_join_leave.py",),
    ),
    Mutant(
        "leave-empty",
        "a stage leaves only when it holds no layer",
        PYTHON + "coordinator/coordinator.py",
        "            if held:\n",
        "            if False:\n",
        ("tests/coordination/test_join_leave.py",),
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant."""

    mutant: Mutant
    caught_by: str
    seconds: float


class Copy:
    """A copy of the repository with a build of its own."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self.folder = folder
        self._jobs = jobs
        self._build = folder / "build" / "mutants"
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
        for name in filter(None, listed.split("\0")):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)

    def configure(self) -> None:
        """Make the build folder: little optimisation, since it is built again and again."""
        cmake_dir = self._output([sys.executable, "-m", "pybind11", "--cmakedir"]).strip()
        self._check([
            "cmake", "-S", str(self.folder), "-B", str(self._build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1", "-DPIPELIVE_CUDA=OFF",
            "-DPIPELIVE_INPLACE=ON", "-DPIPELIVE_BUILD_TESTS=ON",
            f"-Dpybind11_DIR={cmake_dir}", f"-DPython_EXECUTABLE={sys.executable}",
            *(["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"] if shutil.which("ccache") else []),
        ])  # fmt: skip

    def build(self) -> None:
        """Compile what has changed."""
        self._check(["cmake", "--build", str(self._build), "-j", str(self._jobs)])

    def passes(self, test: str) -> bool:
        """Run one selection of tests."""
        if test.startswith("tests/"):
            command = [sys.executable, "-m", "pytest", "-q", "-x", "--timeout=120", test]
            command += ["--hypothesis-profile=no-shrink", "-p", "no:cacheprovider"]
        else:
            program, _, chosen = test.partition(":")
            layer = "cuda" if program.startswith("cuda_") else "cpp"
            command = [str(self._build / layer / program), "--gtest_brief=1", "--gtest_fail_fast"]
            command += [f"--gtest_filter={chosen}"] if chosen else []
        try:
            done = subprocess.run(
                command, cwd=self.folder, env=self._environment(), capture_output=True, timeout=900,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    def _environment(self) -> dict[str, str]:
        # The compiler's cache is to find what was compiled in another copy.
        cache = {"CCACHE_BASEDIR": str(self.folder), "CCACHE_NOHASHDIR": "1"}
        return {**os.environ, **cache, "PYTHONPATH": str(self.folder / "src")}

    def _check(self, command: Sequence[str]) -> None:
        done = subprocess.run(
            command, cwd=self.folder, env=self._environment(), capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")

    def _output(self, command: Sequence[str]) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def try_mutant(copy: Copy, mutant: Mutant) -> Outcome:
    """Apply, build, test, undo."""
    path = copy.folder / mutant.file
    original = path.read_text()
    begin = time.monotonic()
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        if mutant.compiled:
            copy.build()
        caught = next((test for test in mutant.tests if not copy.passes(test)), "")
    finally:
        path.write_text(original)
    return Outcome(mutant, caught, time.monotonic() - begin)


def check_texts(mutants: Sequence[Mutant]) -> None:
    """Refuse a list of mutants that no longer fits the sources."""
    for mutant in mutants:
        found = (ROOT / mutant.file).read_text().count(mutant.old)
        if found != 1:
            raise SystemExit(
                f"mutant {mutant.name}: its text occurs {found} times in {mutant.file}, "
                "expected once"
            )


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as Markdown."""
    lines = ["| rule that was broken | file | seen by |", "|---|---|---|"]
    for outcome in outcomes:
        seen = f"`{outcome.caught_by}`" if outcome.caught_by else "**nothing**"
        lines.append(f"| {outcome.mutant.rule} | `{outcome.mutant.file}` | {seen} |")
    return "\n".join(lines)


def main() -> int:
    """Run the mutants that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only mutants whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--list", action="store_true", help="say what there is")
    arguments = parser.parse_args()
    chosen = [
        mutant
        for mutant in MUTANTS
        if not arguments.words or any(word in mutant.name for word in arguments.words)
    ]
    if arguments.list:
        print("\n".join(f"{mutant.name:18} {mutant.rule}" for mutant in chosen))
        return 0
    check_texts(chosen)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="pipelive-mutants-") as folder:
        copy = Copy(Path(folder), arguments.jobs)
        copy.configure()
        copy.build()
        needed = sorted({test for mutant in chosen for test in mutant.tests})
        red = [test for test in needed if not copy.passes(test)]
        if red:
            raise SystemExit(f"red before anything was broken: {', '.join(red)}")
        for mutant in chosen:
            outcome = try_mutant(copy, mutant)
            outcomes.append(outcome)
            said = f"seen by {outcome.caught_by}" if outcome.caught_by else "SURVIVED"
            print(f"{mutant.name:18} {said} ({outcome.seconds:.0f} s)", flush=True)
            if mutant.compiled:
                copy.build()
    print(f"\n{table(outcomes)}")
    return 0 if all(outcome.caught_by for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
