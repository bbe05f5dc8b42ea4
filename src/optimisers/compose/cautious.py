"""Steps that are taken only where they go with the gradient."""

from typing import Any

from optimisers.arrays.protocol import Array
from optimisers.ops import conj, maximum, mean, real, where
from optimisers.rule import Rule, a_rule, stepped


class Cautious(Rule):
    """Leaves out the elements of a step that point against the gradient, and lengthens the others to make up
    for it.

    Liang et al., "Cautious optimizers: improving training with one line of code", 2024, arXiv:2411.16085: the
    step times k / max(mean(k), 1e-3), k = 1 where step and gradient have one sign and else 0, as in the
    authors' code. The gradient is the one that reaches this rule. Decay is not to be masked, so it stands
    behind: Chain(Cautious(Adam()), DecoupledDecay(0.01, couple=True)).
    """

    rule: Rule

    def check(self) -> None:
        a_rule(self, self.rule)

    def init(self, x: Array) -> Any:
        return self.rule.init(x)

    def apply(self, state: Any, x: Array, dx: Array, *more: Array) -> Any:
        state, step = stepped(self.rule, state, x, dx, more)
        if step is None:
            return state, None
        agrees = where(real(conj(step) * dx) > 0, 1.0, 0.0)
        return state, step * (agrees / maximum(mean(agrees), 1e-3))
