"""A rule as an optimizer of Keras 3: `compile`, callbacks, saving and loss scaling know it as one."""

# Keras answers some questions only in private, and declares few types.
# pyright: reportPrivateUsage=false, reportUntypedBaseClass=false, reportUntypedClassDecorator=false

import contextlib
import itertools
from collections.abc import Generator, Sequence
from typing import Any

from optimisers.arrays import registry
from optimisers.averaged import averaged
from optimisers.errors import BadSetting, BadState
from optimisers.keras.config import described, restored
from optimisers.keras.kept import Kept
from optimisers.keras.library import keras, scopes
from optimisers.keras.rates import Rates
from optimisers.step.choose import Rules, refuse_no_rule

BACKENDS = ("torch", "jax")
"""Those of Keras whose steps our rules compute."""

CALL = "KerasOptimizer(Adam())"


@keras.saving.register_keras_serializable("optimisers")
class KerasOptimizer(keras.optimizers.Optimizer):
    """Trains a Keras model by a rule, with the torch backend in one fused pass in place, with that of JAX
    inside its `jit`: `model.compile(optimizer=opt.KerasOptimizer(opt.AdamW(3e-4)), loss=...)`.

    `rule` is what `setup` takes: a rule, or a dict whose keys are selectors and globs over the paths of
    variables with dots, `"**.bias"`, or `layer_decay(rule)`. `settings` are those of every optimizer of
    Keras: `clipnorm`, `global_clipnorm`, `clipvalue`, `weight_decay`, `use_ema`,
    `gradient_accumulation_steps`, `name`.

    `learning_rate` is the rate of the rule, and may be assigned. Where rules have different rates, or follow
    schedules of ours, it is a factor on all of them, 1.0 at first. A `LearningRateSchedule` of Keras stands
    in its place, `KerasOptimizer(rule, schedule)`; one of ours belongs into the rule.

    The state is saved and loaded with the model, to the last bit, also from one of the two backends into the
    other; `load_model` finds this class once it was imported. Rules that ask for the loss are given it by
    `fit` with the torch backend; elsewhere write `apply(grads, variables, loss=value)` or `stateless_apply`
    in a `train_step` of your own.

    Raises BadSetting for another backend, for rules that ask for second gradients and for shapes that a rule
    does not take, NoMatch as `setup` does, and BadState for what is no rule.
    """

    def __init__(self, rule: Rules, learning_rate: object = None, **settings: Any) -> None:
        if keras.config.backend() not in BACKENDS:
            raise BadSetting(
                f"KerasOptimizer takes the backends {' and '.join(BACKENDS)} of Keras, and this process has "
                f"{keras.config.backend()}; set the environment variable KERAS_BACKEND before anything "
                "imports keras"
            )
        refuse_no_rule(rule, CALL)
        rates = Rates(rule, learning_rate)
        rates.refuse_settings(settings.get("weight_decay"))
        with _on_host():
            super().__init__(rates.given, **settings)
        self._rates = rates
        self._kept: Kept | None = None
        self._paths: Any = {}
        self._loss: Any = None
        self._lent = False

    def build(self, variables: Sequence[Any]) -> None:
        """Set up the state of these variables; Keras calls it before the first step."""
        if self.built:
            return
        super().build(variables)
        trained: dict[str, Any] = {}
        for v in variables:
            if not self._overwrite_variable_with_gradient(v):
                trained[_path(v, trained)] = v
        self._paths = {id(v): name for name, v in trained.items()}
        if trained:
            self._kept = Kept(trained, self._rates, self._variable)

    def _variable(self, value: Any, name: str, like: Any) -> Any:
        """A variable of this optimizer that holds, with the torch backend, the memory of an array."""
        with contextlib.nullcontext() if registry.isarray(value) and like is not None else _on_host():
            return self.add_variable(
                shape=tuple(value.shape),
                initializer=lambda *_, **__: value,
                dtype=keras.backend.standardize_dtype(value.dtype),
                layout=getattr(like, "_layout", None),
                name=name,
            )

    # -- steps --

    def apply(self, grads: Any, trainable_variables: Any = None, *, loss: Any = None) -> None:
        """One step with the gradients of some variables, or of all; `loss` is for rules that ask for it."""
        if self._lent:
            raise BadState("a step was taken inside averaged(), where variables hold their averages")
        if loss is not None:
            self._loss = loss
        try:
            super().apply(grads, trainable_variables)
        finally:
            self._loss = None

    def stateless_apply(
        self, optimizer_variables: Any, grads: Any, trainable_variables: Any, *, loss: Any = None
    ) -> tuple[Any, Any]:
        """(new values of the trained variables, of the optimizer's own) after a step that writes nothing."""
        self._loss = loss
        return super().stateless_apply(optimizer_variables, grads, trainable_variables)

    def scale_loss(self, loss: Any) -> Any:
        """The loss, times the factor for float16; with the torch backend it is noted for the next step."""
        if keras.config.backend() == "torch":
            self._loss = loss.detach()
        return super().scale_loss(loss)

    def _backend_update_step(self, grads: Any, trainable_variables: Any, learning_rate: Any) -> None:
        for compiler in registry.compilers:
            if compiler.looks():
                compiler.aside(self._step, grads, trainable_variables, learning_rate)
                return
        self._step(grads, trainable_variables, learning_rate)

    def _step(self, grads: Sequence[Any], variables: Sequence[Any], learning_rate: Any) -> None:
        kept = self._kept
        assert kept is not None
        slopes = {self._paths[id(v)]: g for v, g in zip(variables, grads, strict=True)}
        trained = {self._paths[id(v)]: v for v in self._trainable_variables if id(v) in self._paths}
        values = {name: v.value for name, v in trained.items()}
        _refuse_sparse(slopes)
        if kept.asks_for_loss and self._loss is None:
            raise BadState(
                f"{self._rates.rule!r} asks for the loss, which Keras hands to optimizers only in fit with "
                "the torch backend, without a LossScaleOptimizer; write apply(grads, variables, loss=value), "
                "or stateless_apply(..., loss=value) in a train_step of your own"
            )
        if kept.inplace and not scopes.in_stateless_scope():
            kept.step_(values, slopes, _number(learning_rate), self._loss)
            return
        rate = keras.ops.convert_to_tensor(learning_rate)
        for name, value in kept.step(values, slopes, rate, self._loss).items():
            trained[name].assign(value)

    # -- the learning rate --

    @property
    def learning_rate(self) -> Any:
        """The rate of the rules, or the factor on their rates, as Keras keeps it."""
        return self._get_current_learning_rate()

    @learning_rate.setter
    def learning_rate(self, learning_rate: object) -> None:
        self._rates.refuse_assigned(learning_rate)
        keras.optimizers.Optimizer.learning_rate.fset(self, learning_rate)

    # -- the state --

    @property
    def tree(self) -> Any:
        """The state as `setup` gives it, by the paths of variables: a copy, to look at with `opt.explain` and
        `opt.current`. A changed one is taken back by assigning it: `optimizer.tree =
        opt.adjust(optimizer.tree, lam=0.1)`.
        """
        if self._kept is None:
            raise BadState("the optimizer has no state yet; call build(variables), or fit")
        return self._kept.seen()

    @tree.setter
    def tree(self, tree: object) -> None:
        if self._kept is None:
            raise BadState("the optimizer has no state yet; call build(variables), or fit")
        rate = self._kept.take(tree)
        if rate is not None and isinstance(self._learning_rate, keras.Variable):
            self._learning_rate.assign(rate)

    @contextlib.contextmanager
    def averaged(self) -> Generator[None, None, None]:
        """For the time of a block the variables hold what their rules evaluate with, as `opt.averaged` gives
        it: `with optimizer.averaged(): model.evaluate(x, y)`. Behind it they are what they were.
        """
        trained = {self._paths[id(v)]: v for v in self._trainable_variables if id(v) in self._paths}
        new = averaged(self.tree, {name: keras.ops.stop_gradient(v.value) for name, v in trained.items()})
        before = {name: keras.ops.copy(keras.ops.stop_gradient(v.value)) for name, v in trained.items()}
        self._lent = True
        try:
            for name, value in new.items():
                trained[name].assign(value)
            yield
        finally:
            for name, value in before.items():
                trained[name].assign(value)
            self._lent = False

    # -- saving --

    def get_config(self) -> dict[str, Any]:
        """Rule and settings as plain data; raises BadState for functions that have no name."""
        return {"rule": described(self._rates.rule), **super().get_config()}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "KerasOptimizer":
        """The optimizer that `get_config` has described, without its state."""
        config = dict(config)
        rule, rate = restored(config.pop("rule"), custom_objects), config.pop("learning_rate")
        if isinstance(rate, dict):
            rate = keras.saving.deserialize_keras_object(rate, custom_objects=custom_objects)
        if not isinstance(rate, float | int):
            return cls(rule, rate, **config)
        made = cls(rule, **config)
        if not made._rates.none:
            made._learning_rate.assign(rate)
        return made


def _on_host() -> Any:
    """Where a step in place reads what variables hold without waiting for a device."""
    return keras.device("cpu") if keras.config.backend() == "torch" else contextlib.nullcontext()


def _path(variable: Any, taken: Any) -> str:
    """The path of a variable with dots, and a number behind it where others have the same."""
    path = str(getattr(variable, "path", variable.name)).replace("/", ".")
    return next(
        found for n in itertools.count(1) if (found := path if n == 1 else f"{path}_{n}") not in taken
    )


def _number(learning_rate: Any) -> float:
    """A learning rate as a number: of a variable, of what a schedule of Keras gives, or of a function."""
    value: Any = getattr(learning_rate, "value", learning_rate)
    return float(value)


def _refuse_sparse(grads: dict[str, Any]) -> None:
    """Raise BadState for gradients that are no arrays: those of JAX that are sparse."""
    for name, g in grads.items():
        if not registry.isarray(g):
            raise BadState(
                f"the gradient of {name} is a {type(g).__name__}, which no rule steps; write "
                "keras.ops.convert_to_tensor(gradient, sparse=False)"
            )
