"""An estimator of scikit-learn that learns batch by batch in NumPy: `partial_fit` is one step of a rule."""

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import optimisers as opt


class SoftmaxRegression(ClassifierMixin, BaseEstimator):
    """Multinomial logistic regression, trained by any rule; rules are values, and can be searched over."""

    def __init__(self, rule: opt.Rule = opt.Adam(0.01), epochs: int = 30, batch: int = 50) -> None:  # noqa: B008 a value
        self.rule, self.epochs, self.batch = rule, epochs, batch

    def partial_fit(self, x: Any, y: Any, classes: Any = None) -> "SoftmaxRegression":
        """One step on one batch; `classes` at the first call."""
        if not hasattr(self, "model_"):
            self.classes_ = np.unique(y if classes is None else classes)
            shape = (x.shape[1], len(self.classes_))
            self.model_ = {"weight": np.zeros(shape), "bias": np.zeros(shape[1])}
            self.state_ = opt.setup(self.rule, self.model_)
        error = self.predict_proba(x)
        error[np.arange(len(x)), np.searchsorted(self.classes_, y)] -= 1
        grads = {"weight": x.T @ error / len(x), "bias": error.mean(0)}
        self.state_, self.model_ = opt.update_(self.state_, self.model_, grads)
        return self

    def fit(self, x: Any, y: Any) -> "SoftmaxRegression":
        """Steps on all batches, so many times."""
        vars(self).pop("model_", None)
        rng = np.random.default_rng(0)
        for _ in range(self.epochs):
            order = rng.permutation(len(x))
            for rows in np.array_split(order, max(1, len(x) // self.batch)):
                self.partial_fit(x[rows], y[rows], classes=np.unique(y))
        return self

    def predict_proba(self, x: Any) -> Any:
        """(examples, classes) probabilities."""
        score = x @ self.model_["weight"] + self.model_["bias"]
        odds = np.exp(score - score.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)

    def predict(self, x: Any) -> Any:
        """The likeliest class of each example."""
        return self.classes_[self.predict_proba(x).argmax(1)]


def main() -> dict[str, float]:
    """How many digits each gets right that it has not seen."""
    x, y = load_digits(return_X_y=True)
    seen, new, seen_y, new_y = train_test_split(x, y, random_state=0)
    found: dict[str, float] = {}
    for name, estimator in {
        "Adam": SoftmaxRegression(opt.Adam(0.01)),
        "Prodigy": SoftmaxRegression(opt.Prodigy()),
        "scikit-learn's own": LogisticRegression(max_iter=1000),
    }.items():
        found[name] = make_pipeline(StandardScaler(), estimator).fit(seen, seen_y).score(new, new_y)
        print(f"{name:20} {found[name]:.3f}")
    return found


if __name__ == "__main__":
    main()
