"""The tables and pictures of docs/protocol.md, made from the code's tables.

`python tests/coordination/protocol_doc.py` writes them into the document.
"""

import re
from pathlib import Path

from pipelive_kv.protocol import JOB, SCHEDULER, STAGE

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/protocol.md"


def machine_table(machine):
    lines = ["| state | event | epoch | next state | |", "|---|---|---|---|---|"]
    states = list(type(machine.start))
    always = [r for r in machine.rules if r.note == "any"]
    for event, age in dict.fromkeys((r.event, r.age) for r in always):
        covered = {r.state for r in always if (r.event, r.age) == (event, age)}
        assert covered == set(states), f"{event} is not allowed in every state"
        lines.append(f"| any | {event} | {age.value} | the same | |")
    merged = {}
    for rule in machine.rules:
        if rule.note != "any":
            key = (rule.state, rule.age, rule.then, rule.note)
            merged.setdefault(key, []).append(rule.event)
    for (state, age, then, note), events in merged.items():
        lines.append(
            f"| {state.value} | {', '.join(events)} | {age.value} | {then.value} | {note} |"
        )
    return "\n".join(lines)


def machine_picture(machine):
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {machine.start.value}"]
    arrows = {}
    for rule in machine.rules:
        if rule.then is not rule.state:
            arrows.setdefault((rule.state.value, rule.then.value), []).append(rule.event)
    for (source, target), events in arrows.items():
        label = ", ".join(events).replace(":", "")
        lines.append(f"    {source} --> {target} : {label}")
    return "\n".join([*lines, "```"])


def job_asks():
    lines = ["| phase | asked, in this order | of | on record |", "|---|---|---|---|"]
    for phase, asks in JOB.asks.items():
        for ask in asks:
            event = f"({ask.event})" if ask.optional else ask.event
            lines.append(f"| {phase.value} | {event} | {ask.of} | {ask.record or ''} |")
    return "\n".join(lines)


def job_edges():
    lines = ["| from | to | on record | all have answered | |", "|---|---|---|---|---|"]
    for edge in JOB.edges:
        why = "; ".join(filter(None, ["a participant was lost" if edge.lost else "", edge.why]))
        lines.append(
            f"| {edge.source.value} | {edge.target.value} | {edge.record or ''} | "
            f"{'yes' if edge.answered else ''} | {why} |"
        )
    return "\n".join(lines)


def job_picture():
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> planned", "    [*] --> recovering"]
    arrows = {}
    for edge in JOB.edges:
        words = []
        if edge.record:
            words.append(f"record says {edge.record}")
        if edge.lost:
            words.append("somebody lost")
        arrows.setdefault((edge.source.value, edge.target.value), []).append(", ".join(words))
    for (source, target), labels in arrows.items():
        label = " or ".join(dict.fromkeys(filter(None, labels)))
        lines.append(f"    {source} --> {target}" + (f" : {label}" if label else ""))
    lines += ["    done --> [*]", "    aborted --> [*]", "```"]
    return "\n".join(lines)


PARTS = {
    "job-picture": job_picture,
    "job-asks": job_asks,
    "job-edges": job_edges,
    "stage-picture": lambda: machine_picture(STAGE),
    "stage-table": lambda: machine_table(STAGE),
    "scheduler-picture": lambda: machine_picture(SCHEDULER),
    "scheduler-table": lambda: machine_table(SCHEDULER),
}


def with_parts(text):
    """The document's text with every generated part as it should be."""
    for name, make in PARTS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
        assert len(pattern.findall(text)) == 1, f"the document has no place for {name}"
        text = pattern.sub(lambda found, make=make: found[1] + make() + "\n" + found[2], text)
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(with_parts(DOCUMENT.read_text()))
