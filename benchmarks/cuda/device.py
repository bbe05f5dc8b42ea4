"""What only a device can show: CUDA graphs, a GradScaler, steps that wait for nobody."""

import contextlib
import math
from collections.abc import Callable, Sequence

import torch

import optimisers as opt
from benchmarks.cuda.place import NEEDS, SCALE, WARM, Place, Step, said
from benchmarks.printing import Report
from benchmarks.torch_peers import LAM
from optimisers.nest import flatten


# -- what only a device can show -----------------------------------------------------------------------------
def graphed(step: Step, place: Place) -> Step:
    """A replay of the step in a CUDA graph, after `WARM` steps without; in a rehearsal, the step."""
    if place.rehearse:
        for _ in range(WARM):
            step()
        return step
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other libraries have threads too
        step()
    return graph.replay


class Lesson:
    """A small network, and what it is to learn."""

    def __init__(self, place: Place) -> None:
        torch.manual_seed(0)
        layers = torch.nn.Linear(16, 33), torch.nn.Tanh(), torch.nn.Linear(33, 4)
        self.module = torch.nn.Sequential(*layers).to(place.name)
        self.inputs, self.wanted = (torch.randn(64, n, device=place.name) for n in (16, 4))

    def loss(self) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.module(self.inputs), self.wanted)

    def values(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.module.parameters()]


def near(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], atol: float = 1e-4) -> None:
    """What a small gradient loses by another order of sums, a moment makes large: so much is let pass."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)


def clipped(eta: float = 1e-2) -> opt.Rule:
    return opt.Chain(opt.ClipGlobalNorm(0.5, throw=False), opt.AdamW(eta, lam=LAM))


def graph_of_train_step(place: Place) -> None:
    captured, eager = Lesson(place), Lesson(place)
    states = {
        captured: opt.setup(clipped(), captured.module, engine=place.engine, capturable=True),
        eager: opt.setup(clipped(), eager.module, engine=place.engine),
    }

    def train(lesson: Lesson) -> None:
        lesson.module.zero_grad(set_to_none=True)
        lesson.loss().backward()
        opt.update_(states[lesson], lesson.module, opt.gradients(lesson.module))

    replay = graphed(lambda: train(captured), place)
    for _ in range(WARM):
        train(eager)
    for eta in (1e-3, 1e-2, 1e-4):
        for state in states.values():
            opt.adjust_(state, eta)
        before = captured.values()
        for _ in range(3):
            replay()
            train(eager)
        near(captured.values(), eager.values())
        moved = max(float((a - b).abs().max()) for a, b in zip(captured.values(), before, strict=True))
        assert eta / 10 < moved < 10 * eta, f"with a rate of {eta} the replays moved by {moved:.1e}"


def scaler_skips_without_waiting(place: Place) -> None:
    scaled, plain = Lesson(place), Lesson(place)
    optimizer = opt.TorchOptimizer(scaled.module, clipped(), engine=place.engine, capturable=True)
    other = opt.TorchOptimizer(plain.module, clipped(), engine=place.engine)
    scaler = torch.amp.GradScaler(place.kind, init_scale=SCALE)
    for n in range(5):
        optimizer.zero_grad()
        other.zero_grad()
        scaler.scale(scaled.loss()).backward()
        infinite = n == 3
        if infinite:
            next(iter(scaled.module.parameters())).grad.fill_(math.inf)
        before = [*scaled.values(), *states_of(optimizer)]
        with place.unsynchronised() if n > 1 else contextlib.nullcontext():
            scaler.step(optimizer)
            scaler.update()
        if infinite:
            after = [*scaled.values(), *states_of(optimizer)]
            same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            assert same, "an infinite gradient moved parameters or state"
            assert scaler.get_scale() == SCALE / 2, "the scaler did not hear of the infinite gradient"
        else:
            plain.loss().backward()
            other.step()
            near(scaled.values(), plain.values())


def states_of(optimizer: opt.TorchOptimizer) -> list[torch.Tensor]:
    """All arrays and numbers of the state."""
    leaves = [optimizer.tree[name].state for name in optimizer.parameters]
    found = [v for state in leaves for _, v in flatten(state)]
    return [torch.as_tensor(v).detach().clone() for v in found]


def misaligned(place: Place) -> None:
    sizes = (4097, 1024, 3, 5000)

    def placed(offset: int, seed: int) -> list[torch.Tensor]:
        draw = torch.Generator().manual_seed(seed)
        arrays = [torch.randn(n, generator=draw) for n in sizes]
        room = [torch.zeros(n + 8, device=place.name) for n in sizes]
        found = [r[offset : offset + n] for r, n in zip(room, sizes, strict=True)]
        for to, a in zip(found, arrays, strict=True):
            to.copy_(a)
        return found

    ends: list[list[torch.Tensor]] = []
    for of_x, of_dx in ((0, 0), (1, 0), (0, 3), (2, 1)):
        xs = placed(of_x, 0)
        state = opt.setup(clipped(), xs, engine=place.engine)
        for n in range(2):
            opt.update_(state, xs, placed(of_dx, n + 1))
        ends.append(xs)
    for xs in ends[1:]:
        near(xs, ends[0], 1e-6)


def waits_for_nobody(rule: opt.Rule, *, capturable: bool) -> Callable[[Place], None]:
    def check(place: Place) -> None:
        xs = [torch.ones(s, device=place.name) for s in ((33, 65), (7,), (4097,))]
        state = opt.setup(rule, xs, engine=place.engine, capturable=capturable)
        for n in range(5):
            gs = [torch.rand_like(x) for x in xs]
            kept = [*xs, *gs]  # the next gradients lie elsewhere
            with place.unsynchronised() if n > 1 else contextlib.nullcontext():
                opt.update_(state, xs, gs)
            assert all(bool(v.isfinite().all()) for v in kept)

    return check


CHECKS: dict[str, tuple[Callable[[Place], None], bool]] = {
    "a CUDA graph of a whole train step, adjusted between replays": (graph_of_train_step, True),
    "a GradScaler: an infinite gradient moves nothing, nobody waits": (scaler_skips_without_waiting, True),
    "tensors that are not aligned": (misaligned, False),
    "AdamW waits for nobody": (waits_for_nobody(opt.AdamW(), capturable=False), True),
    "AdamW with a schedule waits for nobody": (
        waits_for_nobody(opt.AdamW(opt.Cosine(1e-3, 100)), capturable=False),
        True,
    ),
    "ClipGlobalNorm(throw=False) waits for nobody": (waits_for_nobody(clipped(), capturable=False), True),
    "the same with its numbers on the device": (waits_for_nobody(clipped(), capturable=True), True),
}
"""Title -> (check, whether a rehearsal says nothing about it)."""


def check_device(place: Place, report: Report) -> bool:
    """Print a line for each check; whether all is well."""
    well = True
    for title, (check, needs) in CHECKS.items():
        try:
            check(place)
            word = f"{NEEDS}; its code ran on the CPU" if place.rehearse and needs else "ok"
        except Exception as error:  # noqa: BLE001 the line says what went wrong, and the others are still run
            word, well = f"FAILED {said(error)}", False
        report.line(f"{title}: {word}")
    return well
