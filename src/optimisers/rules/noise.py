"""Rules with noise: exploration, sampling, privacy. The numbers follow from a seed (see `ops.normal`)."""

from typing import Any

from optimisers.arrays.protocol import Array, Operand
from optimisers.ops import examples, normal, sqrt, where
from optimisers.ops.derived import is_complex
from optimisers.ops.steps import clock
from optimisers.rule import Rule, Setting, a_seed, not_negative, setting


def noise(x: Array, seed: Operand) -> Any:
    """Normal numbers of variance 1, of complex arrays in each part."""
    return normal(x, seed) * (2**0.5 if is_complex(x) else 1.0)


class AddNoise(Rule):
    """Adds normal noise to the gradient, whose variance falls with the steps t taken so far: variance / (1 +
    t)^gamma.

    Neelakantan et al., "Adding gradient noise improves learning for very deep networks", 2015,
    arXiv:1511.06807, equation 1. It stands first in a chain. The noise follows from `seed`, the path of the
    array and the step; other seeds, other noise.
    """

    variance: Setting = setting(0.01)
    gamma: Setting = setting(0.55)
    seed: Setting = setting(0)

    def check(self) -> None:
        not_negative(self, "variance")
        a_seed(self)

    def apply(self, state: tuple[()], x: Array, dx: Array) -> Any:
        return state, dx + sqrt(self.variance / (1 + clock(dx, 0)) ** self.gamma) * noise(dx, self.seed)


class SGLD(Rule):
    """Stochastic gradient Langevin dynamics: a walk whose places are samples, dx' = eta dx + sqrt(2 eta
    temperature) N(0, 1).

    Welling & Teh, "Bayesian learning via stochastic gradient Langevin dynamics", 2011, International
    Conference on Machine Learning, equation 4, whose step is 2 eta. Where the gradient is that of -log p,
    over all data, the parameters come to be distributed as p^(1 / temperature), up to an error of the order
    of eta.
    """

    eta: Setting = setting(1e-3)
    temperature: Setting = setting(1.0)
    seed: Setting = setting(0)

    def check(self) -> None:
        not_negative(self, "temperature")
        a_seed(self)

    def apply(self, state: tuple[()], x: Array, dx: Array) -> Any:
        size = sqrt(2 * self.eta * self.temperature)
        return state, self.eta * dx + size * noise(dx, self.seed)


class PrivateAggregate(Rule):
    """The mean over examples of their gradients, each clipped to the norm omega over the whole model, with
    normal noise: dx' = (sum of min(1, omega / |g|) g + sigma omega N(0, 1)) / n.

    Abadi et al., "Deep learning with differential privacy", 2016, arXiv:1607.00133, algorithm 1; with descent
    behind it, it is DP-SGD. The gradients have an axis in front, an entry for each of the n examples, as
    `jax.vmap(jax.grad(loss), (None, 0, 0))` and `torch.func.vmap` of `torch.func.grad` give them; the norm is
    that over all arrays of the step whose rule is such. It stands first in a chain. What (epsilon, delta) a
    run has spent is worked out by an accountant from sigma, the share of the data in a batch and the steps.
    The noise is that of `seed`, which must be secret, and no generator for secrets makes it.
    """

    omega: Setting = setting(1.0)
    sigma: Setting = setting(1.0)
    seed: Setting = setting(0)

    per_example = True

    def check(self) -> None:
        not_negative(self, "omega", "sigma")
        a_seed(self)

    def weigh(self, norms: Array) -> Any:
        return where(norms > self.omega, self.omega / where(norms > self.omega, norms, 1.0), 1.0)

    def apply(self, state: tuple[()], x: Array, dx: Array) -> Any:
        return state, (dx + self.sigma * self.omega * noise(dx, self.seed)) / examples(dx)
