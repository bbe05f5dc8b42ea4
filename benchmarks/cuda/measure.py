"""Building the ways of a row, whether they agree, and their timings."""

import dataclasses
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import optimisers as opt
from benchmarks import shapes
from benchmarks.cuda.place import CHECKED, NEEDS, Place, said
from benchmarks.cuda.rows import ROWS
from benchmarks.cuda.ways import Given, Row, Running, Way
from benchmarks.printing import Report, Table
from benchmarks.timing import Timings, interleaved
from benchmarks.torch_cpu import quiet

MANY = 200
"""Tensors from which on torch.compile takes minutes."""


# -- building and measuring ----------------------------------------------------------------------------------
@dataclasses.dataclass
class Session:
    """One run of this command."""

    place: Place
    report: Report
    seconds: float
    compile: bool
    end: float
    bandwidth: float = 0.0
    """The best bytes per second of a copy so far."""
    failures: list[str] = dataclasses.field(default_factory=list[str])
    others: dict[str, set[str]] = dataclasses.field(default_factory=dict[str, set[str]])
    """Of each row, the ways that compute other numbers."""

    def left(self) -> float:
        return self.end - time.perf_counter()

    def copied(self) -> None:
        """Copy 1 GiB back and forth, and note the best speed."""
        n = 2**20 if self.place.rehearse else 2**28
        a, b = (torch.zeros(n, device=self.place.name) for _ in range(2))
        run = Running(lambda: b.copy_(a), self.place.wait, host=1e-5)
        found = interleaved({"copy": run}, seconds=1.0, least=10, most=30, clock=self.by_device)
        self.bandwidth = max(self.bandwidth, 2 * a.nbytes / found.minimum("copy"))

    def by_device(self, run: Running) -> float:
        return run.burst() if self.place.rehearse else run.on_device()


def refused(way: Way, given: Given, session: Session, spare: float) -> str:
    """Why a way is not built; empty if it is."""
    if way.compiles and len(given.xs) > MANY and not session.compile:
        return "it compiles for minutes; write --compile"
    if way.compiles and session.place.rehearse and not session.compile:
        return NEEDS
    hurried = session.left() < 120 and not (session.compile or session.place.rehearse)
    if hurried and (way.compiles or way.traces):
        return "no time is left for it to compile"
    need = given.count * way.keeps + max(spare, given.count * way.spare)
    free = 0.95 * session.place.free()
    if need > free:
        return f"it takes {need / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free"
    return ""


def built(row: Row, given: Given, session: Session, *, among: Sequence[str]) -> dict[str, Running]:
    """The ways of a row that run here, after their first steps; what is left out is printed."""
    found: dict[str, Running] = {}
    spare = 0.0
    for title in among:
        way = row.ways[title]
        why = refused(way, given, session, spare)
        if not why:
            begin = time.perf_counter()
            try:
                with quiet():
                    if way.compiles:
                        torch.compiler.reset()  # else it takes the shapes of the last model for changing ones
                    run = way.build(given)
                    run.step()
                    run.wait()
            except Exception as error:  # noqa: BLE001 the others are still timed
                why = said(error)
                if way.ours:
                    session.failures.append(f"{row.title}, {title}: {why}")
            else:
                run.taken += 1
                found[title] = run
                spare = max(spare, given.count * way.spare)
                if way.compiles or way.traces:
                    session.report.line(f"  {title}: first step after {time.perf_counter() - begin:.1f} s")
        if why:
            session.report.line(f"  left out: {title}: {why}")
    return found


def agreement(key: str, session: Session) -> Table:
    """Lines on whether all ways of a row compute the same numbers as the first peer, on six arrays."""
    row = ROWS[key]
    first = next(title for title, way in row.ways.items() if not way.ours)
    ends: dict[str, list[torch.Tensor]] = {}
    for title in (first, *(t for t in row.ways if t != first)):
        given = Given("tiny", row.dtype, session.place, row.scale)
        start = [x.double().cpu() for x in given.xs]
        for run in built(row, given, session, among=[title]).values():
            with quiet():
                for _ in range(CHECKED - run.taken):
                    run()
            run.wait()
            found = given.xs if run.results is None else run.results()
            ends[title] = [v.detach().double().cpu() for v in found]
        if first not in ends:
            return []
    way = sum(float((a - b).abs().sum()) for a, b in zip(ends[first], start, strict=False))
    lines: Table = []
    for title, end in ends.items():
        pairs = list(zip(end, ends[first], strict=True))
        far = sum(float((a - b).abs().sum()) for a, b in pairs) / way
        same = far <= 1e-3  # Optax works out 1 - beta**t in float32, a bfloat16 may be rounded the other way
        if not same:
            session.others.setdefault(key, set()).add(title)
            if row.ways[title].ours:
                session.failures.append(f"{row.title}, {title}: other numbers than {first}")
        lines.append([key, title, f"{far:.1e}", "same" if same else "other"])
    return lines


def launches(run: Running, place: Place) -> str:
    """How many kernels a step launches, and copies and fills beside them."""
    if place.rehearse:
        return ""
    from torch.profiler import ProfilerActivity, profile

    try:
        run.wait()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            run()
            run.wait()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            seen.export_chrome_trace(str(path))
            kinds = [e.get("cat") for e in json.loads(path.read_text())["traceEvents"]]
    except Exception as error:  # noqa: BLE001 without a profiler there is no count
        return said(error)[:12]
    kernels, copies = kinds.count("kernel"), kinds.count("gpu_memcpy") + kinds.count("gpu_memset")
    return f"{kernels} + {copies}" if copies else str(kernels)


@dataclasses.dataclass
class Measured:
    """The timings of a row on a model."""

    row: Row
    ms: Timings
    device: dict[str, float]
    host: dict[str, float]
    launches: dict[str, str]
    share: dict[str, float]
    same: list[str]
    """Peers that compute the same numbers."""

    @property
    def best(self) -> str:
        """The fastest of them; empty if there is none."""
        return min(self.same, key=self.ms.median, default="")

    def faster(self, way: str, peer: str) -> tuple[float, float]:
        """How many times as fast as a peer: by medians, by minima."""
        return self.ms.ratio(peer, way), self.ms.ratio_of_minima(peer, way)


def measure(key: str, name: str, session: Session) -> Measured | None:
    """Time the ways of a row on a model and print their table."""
    row, place = ROWS[key], session.place
    session.copied()
    stand_in = "tiny" if place.rehearse else name
    title = f"{shapes.TITLES[name]}, {row.title}"
    session.report.line(title + (": six arrays stand in for it" if place.rehearse else ""))
    n, size = shapes.count(stand_in), row.dtype.itemsize
    first = next(iter(row.ways.values()))
    if n * (2 * size + first.keeps) > 0.95 * place.free():
        session.report.line("  left out: it does not fit the memory of this device")
        return None
    given = Given(stand_in, row.dtype, place, row.scale)
    with quiet():
        runs = built(row, given, session, among=list(row.ways))
        if row.judged not in runs:
            return None
        measured = timed_ways(row, runs, session)
    moved = sum(g.bytes_per_parameter * g.parameters for g in opt.explain(runs[row.judged].state).groups)
    measured.share = {t: moved / measured.ms.median(t) / session.bandwidth for t in runs}
    measured.same = [t for t in runs if not row.ways[t].ours and t not in session.others.get(key, set())]
    show_measured(title, measured, moved, n, session)
    return measured


def timed_ways(row: Row, runs: Mapping[str, Running], session: Session) -> Measured:
    """Bursts, single calls and the device's own time of all ways, each in turn."""
    rehearse, s = session.place.rehearse, session.seconds
    for run in () if rehearse else runs.values():
        run.burst()
        run.repeats = min(30, max(3, int(0.03 / run.burst())))
    how = {"least": 1, "most": 1, "warmup": 0} if rehearse else {"least": 7, "most": 100, "warmup": 1}
    host = interleaved(runs, seconds=s / 4, clock=Running.call, **how)
    for title, run in runs.items():
        run.host = host.median(title)
    ms = interleaved(runs, seconds=s / 2, clock=Running.burst, **how)
    seen = {t: r for t, r in runs.items() if r.of_torch}
    device = interleaved(seen, seconds=s / 4, clock=session.by_device, **how)
    return Measured(
        row,
        ms,
        {t: device.median(t) for t in seen},
        {t: host.median(t) for t in runs},
        {t: launches(r, session.place) for t, r in runs.items()},
        {},
        [],
    )


def show_measured(title: str, m: Measured, moved: int, n: int, session: Session) -> None:
    """The table of one row on one model."""
    rows = [
        [
            t,
            f"{m.ms.median(t) * 1e3:.3f}",
            f"{m.ms.minimum(t) * 1e3:.3f}",
            f"{m.device[t] * 1e3:.3f}" if t in m.device else "",
            f"{m.share[t]:.0%}",
            m.launches[t],
            f"{m.host[t] * 1e6:.0f}",
            f"{m.faster(t, m.best)[0]:.2f}x" if m.best else "",
        ]
        for t in m.ms.names
    ]
    if session.place.rehearse:
        note = "; no measurement"
    else:
        note = "; all of it fits the cache" if moved < cache_of_device() else ""
    report_title = (
        f"{title}: {n / 1e6:.1f} M parameters, {moved / n:.0f} bytes each{note}; medians of "
        f"{len(m.ms.seconds[m.ms.names[0]])} bursts"
    )
    head = ["way", "ms", "min", "device", "of copy", "launches", "host us", "best peer/this"]
    session.report.table(report_title, head, rows)


def cache_of_device() -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size
