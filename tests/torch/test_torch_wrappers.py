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


class Pullback(Lookahead):
    """Lookahead that averages the momentum too, by the name that torch has for it."""

    def step(self) -> None:
        super().step()
        if self.steps % 2 == 0:
            for group in self.base.param_groups:
                for p in group["params"]:
                    state = self.base.state[p]
                    if "momentum_buffer" in state:
                        slow = state.setdefault("slow_momentum", torch.zeros_like(p))
                        state["momentum_buffer"] = slow.lerp(state["momentum_buffer"], 0.5)
                        slow.copy_(state["momentum_buffer"])


class Scaled(Lookahead):
    """Keeps, beside the state of the parameters, a dict by parameter, as wrappers do that tune a scale."""

    def step(self) -> None:
        known = self.base.state["scale"]
        for group in self.base.param_groups:
            for p in group["params"]:
                known.setdefault(p, p.detach().clone())
        known["steps"] = known.get("steps", 0) + 1
        self.base.step()
        for group in self.base.param_groups:
            for p in group["params"]:
                with torch.no_grad():
                    p.lerp_(known[p], 0.1 / known["steps"])

    def state_dict(self) -> Any:
        saved = self.base.state_dict()
        held = saved["state"].pop("scale")
        ps = [p for group in self.base.param_groups for p in group["params"]]
        return {**saved, "scale": [held["steps"], [held[p] for p in ps]]}

    def load_state_dict(self, saved: Any) -> None:
        steps, values = saved["scale"]
        ps = [p for group in self.base.param_groups for p in group["params"]]
        state = {**saved["state"], "scale": {"steps": steps, **dict(zip(ps, values, strict=True))}}
        self.base.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


class Sharpness(torch.optim.Optimizer):
    """Sharpness-aware minimisation as its wrappers are built: groups with a radius `rho` of their own, which
    the optimiser inside shares, as it shares the state.
    """

    def __init__(self, params: Any, base: Any) -> None:
        super().__init__(params, {"rho": 0.05, "adaptive": False})
        self.base = base(self.param_groups)
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def step(self, closure: Any = None) -> None:
        ps = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["old"] = p.clone()
                    p.add_(p.grad, alpha=group["rho"] / float(p.grad.norm()))
        closure()
        with torch.no_grad():
            for p in ps:
                p.copy_(self.state[p].pop("old"))
        self.base.step()

    def load_state_dict(self, saved: Any) -> None:
        super().load_state_dict(saved)
        self.base.param_groups, self.base.state = self.param_groups, self.state


def optimiser(kind: str, params: Any) -> Any:
    if kind == "ours":
        return opt.TorchOptimizer(params, opt.SGD(0.01, 0.9))
    return torch.optim.SGD(params, 0.01, 0.9)


def made(kind: str) -> tuple[Any, Any]:
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    return p, optimiser(kind, [p])


def walked(p: Any, wrapper: Any, steps: range) -> None:
    for n in steps:
        p.grad = (p.detach() - n).sign() * (1 + p.detach() ** 2)
        wrapper.step()


@pytest.mark.parametrize("wrapper", [Lookahead, ScheduleFree, Pullback], ids=lambda c: c.__name__)
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


def through_a_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_what_is_kept_beside_the_parameters_goes_on_from_a_file() -> None:
    ends: list[Any] = []
    for kind in ("ours", "torch"):
        p, base = made(kind)
        around = Scaled(base)
        walked(p, around, range(3))
        q, other = made(kind)
        saved = through_a_file([p.detach(), around.state_dict()])
        with torch.no_grad():
            q.copy_(saved[0])
        again = Scaled(other)
        again.load_state_dict(saved[1])
        walked(q, again, range(3, 6))
        walked(p, around, range(3, 6))

        assert torch.equal(p, q)

        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


def sharp(kind: str, p: Any) -> Sharpness:
    return Sharpness([p], lambda groups: optimiser(kind, groups))


def flattened(p: Any, around: Sharpness, steps: range) -> None:
    for n in steps:

        def gradient(n: int = n) -> None:
            p.grad = (p.detach() - n).sign() * (1 + p.detach() ** 2)

        gradient()
        around.step(gradient)


def test_the_radius_of_sharpness_is_no_momentum_and_goes_on_from_a_file() -> None:
    ends: list[Any] = []
    for kind in ("ours", "torch"):
        p, _ = made(kind)
        around = sharp(kind, p)
        flattened(p, around, range(4))
        q, _ = made(kind)
        value, saved = through_a_file([p.detach(), around.state_dict()])
        with torch.no_grad():
            q.copy_(value)
        again = sharp(kind, q)
        again.load_state_dict(saved)
        flattened(q, again, range(4, 8))
        flattened(p, around, range(4, 8))

        assert torch.equal(p, q)
        assert around.param_groups[0]["rho"] == 0.05

        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


def test_two_names_of_one_setting_with_two_values_are_refused() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(opt.BadSetting, match=r"sets rho to 0.05 and, by its name momentum, to 0.9"):
        opt.TorchOptimizer([{"params": [p], "rho": 0.05, "momentum": 0.9}], opt.SGD(0.1, 0.5))


# -- the packages themselves, where they are installed -------------------------------------------------------


def around_by(package: str, base: Any) -> Any:
    module = pytest.importorskip(package)
    if package == "schedulefree":
        return module.ScheduleFreeWrapper(base, momentum=0.9)
    return module.Lookahead(base, k=3, pullback_momentum="pullback")


@pytest.mark.parametrize("package", ["schedulefree", "pytorch_optimizer"])
def test_wrappers_of_packages_go_the_way_they_go_around_torch(package: str) -> None:
    ends: list[Any] = []
    for kind in ("ours", "torch"):
        p, base = made(kind)
        around = around_by(package, base)
        if package == "schedulefree":
            around.train()
        walked(p, around, range(8))
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


def test_the_sam_of_a_package_goes_the_way_it_goes_around_torch() -> None:
    package = pytest.importorskip("pytorch_optimizer")
    ends: list[Any] = []
    for kind in ("ours", "torch"):
        p, _ = made(kind)
        flattened(p, package.SAM([p], lambda groups, kind=kind: optimiser(kind, groups)), range(8))
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)
