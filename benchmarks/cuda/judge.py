"""What is asked of the timings, and what other sizes of blocks would give."""

import itertools

import torch

from benchmarks.cuda.measure import Measured, Session
from benchmarks.cuda.rows import FUSED
from benchmarks.cuda.ways import Given, Running, adamw, ours
from benchmarks.printing import Table, verdict
from benchmarks.timing import interleaved, judged


# -- targets -------------------------------------------------------------------------------------------------
def targets(key: str, name: str, m: Measured) -> Table:
    """Lines for a row on a model: what, what was measured, what is asked for if anything is, verdict."""
    way, t = m.row.judged, m.ms

    def faster(least: float, peer: str) -> list[str]:
        what = f"{name}: {key}: times as fast as {peer or 'torch'}"
        asked = f">= {least:g}" if least else ""
        if peer not in t.names:
            return [what, "not measured", asked, ""]
        by_median, by_minimum = m.faster(way, peer)
        met = judged(by_median, by_minimum, least) if least else ""
        return [what, f"{by_median:.2f}, {by_minimum:.2f}", asked, met]

    calls = [p for p in m.same if not m.row.ways[p].compiles]
    by_calls = min(calls, key=t.median, default="")
    compiled = [p for p in m.same if p not in calls]
    if key == "adamw":
        lines = [faster(3 if name == "small" else 1, FUSED)]
        if name in ("gpt2", "xl"):
            share = m.share[way]
            best = share * t.median(way) / t.minimum(way)
            found = f"{share:.1%}, {best:.1%}"
            lines.append([f"{name}: {key}: share of a copy", found, ">= 92 %", judged(share, best, 0.92)])
        if name == "gpt2":
            us = m.host[way] * 1e6
            lines.append([f"{name}: {key}: host us of a step", f"{us:.0f}", "<= 100", verdict(us, 100)])
        return lines
    least = 1.7 if key == "recipe" else 0.0
    return [faster(least, peer) for peer in (by_calls, *compiled)]


# -- other sizes of blocks -----------------------------------------------------------------------------------
def tune(session: Session) -> None:
    """Print the time of a step on GPT-2 for other constants of the engine: in float32, and with bfloat16
    parameters beside float32 state, whose kernels take more registers.
    """
    from optimisers.engines.cuda import launch as engine

    place = session.place
    before = engine.CHUNK, engine.BLOCK, engine.OPTIONS, engine.NARROW
    for dtype in (torch.float32, torch.bfloat16):
        given = Given("tiny" if place.rehearse else "gpt2", dtype, place)
        rows: Table = []
        try:
            for chunk, block, warps in itertools.product(
                (2048, 4096, 8192, 16384, 65536), (512, 1024, 2048, 4096), (4, 8)
            ):
                if block > chunk or (place.rehearse and chunk > 2048):
                    continue
                engine.CHUNK, engine.BLOCK = chunk, block
                engine.OPTIONS = before[2] | {"num_warps": warps}
                engine.NARROW = before[3] | {"num_warps": warps}
                run = ours(adamw())(given)
                run.repeats = 1 if place.rehearse else 5
                found = interleaved({"step": run}, seconds=0.1, least=3, most=30, clock=Running.burst)
                own = (chunk, block, warps) == (*before[:2], before[2]["num_warps"])
                rows.append(
                    [
                        f"{chunk}{' (as it is)' if own else ''}",
                        str(block),
                        str(warps),
                        f"{found.median('step') * 1e3:.3f}",
                        f"{found.minimum('step') * 1e3:.3f}",
                    ]
                )
        finally:
            engine.CHUNK, engine.BLOCK, engine.OPTIONS, engine.NARROW = before
        rows.sort(key=lambda r: float(r[3]))
        title = f"AdamW on GPT-2 small, {str(dtype).removeprefix('torch.')}"
        session.report.table(title, ["chunk", "block", "warps", "ms", "min"], rows)
