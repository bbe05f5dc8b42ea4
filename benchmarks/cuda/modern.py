"""How fast are the rules that people train with today on a device? A step of each, beside a copy."""

import torch

import optimisers as opt
from benchmarks import shapes
from benchmarks.cuda.measure import Session
from benchmarks.cuda.place import said
from benchmarks.cuda.ways import Given, Running, running
from benchmarks.modern_rows import ROWS, Row
from benchmarks.timing import interleaved
from benchmarks.torch_cpu import quiet

SOME = 12
"""Every so many rules one is tried in a rehearsal."""


def step_of(row: Row, given: Given) -> Running:
    """Our step of a rule, with what it is given beside gradients."""
    state = given.setup(row.rule)
    further = [[g.abs() for g in given.dxs]] if row.given == "second" else []
    loss = 1.0 if row.given == "loss" else None
    return running(given, lambda: opt.update_(state, given.xs, given.dxs, *further, loss=loss), state=state)


def measure_modern(session: Session) -> None:
    """Time every rule on GPT-2 small and print the table; a rule that fails is a failure of the session."""
    place, report = session.place, session.report
    lines = list[list[str]]()
    session.copied()
    chosen = {name: row for name, row in ROWS.items() if row.given != "examples"}
    for name, row in list(chosen.items())[:: SOME if place.rehearse else 1]:
        if session.left() < 5 and not place.rehearse:
            report.line(f"left out: {name} and what follows it: no time is left")
            break
        try:
            lines.append([name, *cells(row, session)])
        except Exception as error:  # noqa: BLE001 the others are still timed
            session.failures.append(f"{name}: {said(error)}")
        place.free()
    title = f"{shapes.TITLES['gpt2']}, float32: rules of today, medians of bursts"
    report.table(title, ["rule", "ms", "min", "passes", "bytes", "of copy"], lines)


def cells(row: Row, session: Session) -> list[str]:
    """What was measured of a rule."""
    place = session.place
    given = Given("tiny" if place.rehearse else "gpt2", torch.float32, place)
    with quiet():
        run = step_of(row, given)
        run.step()
        run.repeats = 1 if place.rehearse else 5
        how = {"least": 1, "most": 1, "warmup": 0} if place.rehearse else {"least": 5, "most": 30}
        found = interleaved({"step": run}, seconds=0.2, clock=Running.burst, **how)
    groups = opt.explain(run.state).groups
    moved = sum(g.bytes_per_parameter * g.parameters for g in groups)
    return [
        f"{found.median('step') * 1e3:.3f}",
        f"{found.minimum('step') * 1e3:.3f}",
        str(max(g.passes for g in groups)),
        f"{moved / given.count:.0f}",
        f"{moved / found.median('step') / session.bandwidth:.0%}",
    ]
