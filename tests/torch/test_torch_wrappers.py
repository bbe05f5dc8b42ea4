"""Wrappers of other packages keep entries of their own in `state`, and go on as they do around torch.optim,
also from a file.
"""

import io
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import optimisers as opt  # noqa: E402 torch may not be there


class Lookahead:
    """Every second step the parameters go half the way back to a slow copy, kept beside the state."""

    def __init__(self, base: Any) -> None:
        self.base, self.steps = base, 0

    def step(self) -> None:
        for group in self.base.param_groups:
            for p in group["params"]:
                self.base.state[p].setdefault("slow_buffer", p.detach().clone())
        self.base.step()
        self.steps += 1
        if self.steps % 2 == 0:
            for group in self.base.param_groups:
                for p in group["params"]:
                    slow = self.base.state[p]["slow_buffer"]
                    slow.add_(p.detach() - slow, alpha=0.5)
                    with torch.no_grad():
                        p.copy_(slow)


class ScheduleFree(Lookahead):
    """Steps z by the optimiser and averages it into the parameters."""

    def step(self) -> None:
        self.steps += 1
        for group in self.base.param_groups:
            for p in group["params"]:
                z = self.base.state[p].setdefault("z", p.detach().clone())
                y = p.detach().clone()
                with torch.no_grad():
                    p.copy_(z)
                self.base.state[p]["y"] = y
        self.base.step()
        for group in self.base.param_groups:
            for p in group["params"]:
                self.base.state[p]["z"] = p.detach().clone()
                with torch.no_grad():
                    p.copy_(self.base.state[p]["y"].lerp(p, 1 / self.steps))


def made(kind: str) -> tuple[Any, Any]:
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    if kind == "ours":
        return p, opt.TorchOptimizer([p], opt.SGD(0.01, 0.9))
    return p, torch.optim.SGD([p], 0.01, 0.9)


def walked(p: Any, wrapper: Any, steps: range) -> None:
    for n in steps:
        p.grad = (p.detach() - n).sign() * (1 + p.detach() ** 2)
        wrapper.step()


@pytest.mark.parametrize("wrapper", [Lookahead, ScheduleFree], ids=lambda c: c.__name__)
def test_a_wrapper_goes_the_way_it_goes_around_torch_also_from_a_file(wrapper: type) -> None:
    ends: list[Any] = []
    for kind in ("ours", "torch"):
        p, base = made(kind)
        around = wrapper(base)
        walked(p, around, range(5))
        file = io.BytesIO()
        torch.save([p.detach(), base.state_dict(), around.steps], file)
        file.seek(0)
        value, state, steps = torch.load(file, weights_only=True)
        q, other = made(kind)
        with torch.no_grad():
            q.copy_(value)
        other.load_state_dict(state)
        again = wrapper(other)
        again.steps = steps
        walked(q, again, range(5, 10))
        walked(p, around, range(5, 10))

        assert torch.equal(p, q)

        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)
