"""`python -m optimisers`: see the rules, look inside one, train with them, check this machine."""

import argparse
import contextlib
import difflib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import re
import stat
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import optimisers as opt
from optimisers.engines import cache
from optimisers.engines.addressed import pointers
from optimisers.engines.cpu import threads
from optimisers.engines.cpu.limits import limits

NEEDED = ("optimisers", "numpy", "numba", "platformdirs")
OPTIONAL = (
    *("matplotlib", "rich", "scikit-learn", "ml_dtypes", "attrs"),
    *("torch", "triton", "jax", "cupy", "optax", "flax", "keras"),
)

SAME = 4
"""Units in the last place by which two engines may differ."""

SHAPES = {"w": (30, 40), "b": (40,)}
"""The arrays of the self-check."""

MAKERS = {"numpy": ("numpy", "array"), "torch": ("torch", "tensor"), "jax": ("jax.numpy", "array")}
"""What makes an array of each library, on its usual device."""

WITHIN = 2e-6
"""How far a few steps in float32 may end from those in float64, as a part of the largest parameter."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m optimisers", description=opt.__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., int]) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=docstring(run), description=docstring(run))
        sub.set_defaults(run=run)
        return sub

    command("demo", demo)
    command("list", list_rules)
    command("show", show).add_argument("rule", metavar="RULE", help="the name of a rule, as `list` prints it")
    command("doctor", doctor)
    given = vars(parser.parse_args(arguments))
    return given.pop("run")(**given)


def failed(message: str) -> int:
    """Say why on the error stream; the exit status of a command that could not run."""
    print(message, file=sys.stderr)
    return 1


def docstring(of: object) -> str:
    return inspect.getdoc(of) or ""


def sentence(of: object) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = " ".join(docstring(of).partition("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z])", paragraph, maxsplit=1)[0]


# -- training ------------------------------------------------------------------------------------------------


def demo() -> int:
    """Let four rules race on a classifier of handwritten digits; writes demo.png."""
    try:
        importlib.import_module("optimisers.curves")  # drawn by at the end, asked for before the race
        run = importlib.import_module("optimisers.demo").run
    except ModuleNotFoundError as error:
        return failed(
            f'the demo needs {error.name}, which is not installed; write pip install "optimisers[demo]"'
        )
    run()
    return 0


# -- rules ---------------------------------------------------------------------------------------------------


def rules() -> dict[str, type[opt.Rule]]:
    """Every public rule, by name."""
    public = [getattr(opt, name) for name in sorted(opt.__all__)]
    return {
        r.__name__: r for r in public if isinstance(r, type) and issubclass(r, opt.Rule) and r is not opt.Rule
    }


def call_of(rule: type[opt.Rule]) -> str:
    """How to write the rule: `Momentum(eta=0.01, rho=0.9)`."""
    bare = [p.replace(annotation=p.empty) for p in inspect.signature(rule).parameters.values()]
    return rule.__name__ + str(inspect.Signature(bare))


def list_rules() -> int:
    """Print every rule: its settings with their defaults, and what it does."""
    for rule in rules().values():
        said = textwrap.fill(sentence(rule), 110, initial_indent="    ", subsequent_indent="    ")
        print(f"{call_of(rule)}\n{said}")
    return 0


def show(rule: str) -> int:
    """Print what a rule does, what its step costs, and the kernel that is generated from it."""
    known = rules()
    if rule not in known:
        names = {name.lower(): name for name in known}
        close = difflib.get_close_matches(rule.lower(), names, n=1)
        hint = f"did you mean {names[close[0]]}?" if close else f"there are {', '.join(known)}"
        return failed(f"there is no rule {rule}; {hint}")
    print(f"{call_of(known[rule])}\n\n{docstring(known[rule])}")
    try:
        one = known[rule]()
    except (TypeError, opt.BadSetting):
        print(f"\nIt has settings without a default: give them and write print(opt.kernel({rule}(...))).")
        return 0
    one, state = shown(one)
    if isinstance(one, opt.Chain) and rule != "Chain":
        print(f"\nBehind another rule, as in {one!r}:")
    print(f"\n{opt.explain(state)}\n\n{opt.kernel(one)}")
    return 0


def shown(rule: opt.Rule) -> tuple[opt.Rule, opt.State]:
    """A rule with a state for 1,000 parameters: for a vector or, if it refuses that, for a matrix; behind
    another rule if it takes the rate of that.
    """
    for shape in ((1000,), (20, 50)):
        with contextlib.suppress(opt.BadSetting):
            return rule, opt.setup(rule, np.zeros(shape, np.float32))
    chain = opt.Chain(opt.Descent(), rule)
    return chain, opt.setup(chain, np.zeros(1000, np.float32))


# -- the machine ---------------------------------------------------------------------------------------------


def doctor() -> int:
    """Check this machine: versions, cache, threads, and whether the fused engine works."""
    works, step = fused_step("numba")
    works_there, step_there = cuda_step()
    right, lines = self_check()
    for name, found in {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        **{name: version(name) for name in NEEDED},
        "optional": ", ".join(f"{name} {version(name)}" for name in OPTIONAL),
        "import": f"{seconds_to_import():.3f} s beyond that of NumPy",
        "threads": f"{said_of_threads()}, alone below {threads.SERIAL_BELOW:,} elements",
        "kernel cache": described(cache.directory()),
        "fused engine": step,
        "addresses": "; ".join(f"{name}: {road}" for name, road in addresses().items()),
        "CUDA engine": step_there,
        "self-check": f"\n{'':<14}".join(lines),
    }.items():
        print(f"{name:<14}{found}")
    return 0 if works and works_there and right else 1


def said_of_threads() -> str:
    """How many threads a large step uses, and what says so."""
    found = limits()
    reason = min(found, key=found.__getitem__)
    return f"{found[reason]} (by {'16 at most' if reason == 'most' else reason})"


def addresses() -> dict[str, str]:
    """How kernels find the arrays of each library that is installed."""
    here = [name for name in pointers.LOOKS if importlib.util.find_spec(name) is not None]
    return {name: str(pointers.road(name, "cpu")) for name in here}


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def seconds_to_import() -> float:
    """How long `import optimisers` takes in a fresh process that has NumPy."""
    code = "import numpy, time; t = time.perf_counter(); import optimisers; print(time.perf_counter() - t)"
    return float(
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    )


def described(directory: Path) -> str:
    """A directory with its mode and owner, as far as there is one."""
    if not directory.exists():
        return f"{directory}, not made yet"
    mode = stat.S_IMODE(directory.stat().st_mode)
    owner = f", owner {directory.owner()}" if os.name == "posix" else ""
    return f"{directory}, mode {mode:o}{owner}"


def self_check() -> tuple[bool, list[str]]:
    """Whether every engine of the libraries that are installed steps as float64 does, and a line on each: the
    one that is chosen, with why it is no faster one, and the interpreter.
    """
    wanted, _ = few_steps("numpy", "interpret", "float64")
    right, lines = True, list[str]()
    for library in MAKERS:
        if importlib.util.find_spec(library) is None:
            lines.append(f"{library:<7}is not installed")
            continue
        for engine in (None, "interpret"):
            start = time.perf_counter()
            try:
                found, name = few_steps(library, engine, "float32")
            except Exception as error:  # noqa: BLE001 whatever is wrong is what was asked for
                right = False
                lines.append(f"{library:<7}fails: {type(error).__name__}: {error}")
                continue
            off = float(np.max(np.abs(found - wanted)) / np.max(np.abs(wanted)))
            right = right and off <= WITHIN
            verdict = "right" if off <= WITHIN else "WRONG"
            lines.append(
                f"{library:<7}{name}: {verdict}, within {off:.1e} of float64, "
                f"{time.perf_counter() - start:.2f} s"
            )
    return right, lines


def few_steps(library: str, engine: str | None, dtype: str) -> tuple[Any, str]:
    """(two arrays after three steps, as one of NumPy; the engine that ran them, and why no faster one)."""
    module, maker = MAKERS[library]
    make: Any = getattr(importlib.import_module(module), maker)
    rng = np.random.default_rng(0)
    model, *grads = (
        {name: make(rng.standard_normal(shape).astype(dtype)) for name, shape in SHAPES.items()}
        for _ in range(4)
    )
    state = opt.setup(opt.Chain(opt.ClipGlobalNorm(1.0), opt.AdamW(0.01)), model, engine=engine)
    for each in grads:
        state, model = opt.update(state, model, each)
    (group,) = opt.explain(state).groups
    why = f" ({group.reason})" if group.reason and engine is None else ""
    return np.concatenate([np.ravel(np.asarray(x)) for x in model.values()]), f"{group.engine}{why}"


def cuda_step() -> tuple[bool, str]:
    """The same on a CUDA device, where PyTorch is installed and reaches one."""
    if importlib.util.find_spec("torch") is None:
        return True, "PyTorch is not installed"
    torch: Any = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return True, "PyTorch reaches no CUDA device"
    works, step = fused_step("triton", lambda a: torch.from_numpy(a).cuda(), lambda x: x.cpu().numpy())
    return works, f"{torch.cuda.get_device_name()}: {step}"


def fused_step(engine: str, put: Any = np.asarray, fetch: Any = np.asarray) -> tuple[bool, str]:
    """Whether one fused step equals the interpreter's, and a sentence on it; `put` and `fetch` bring arrays
    there and back.
    """
    rng = np.random.default_rng(0)
    x, dx = (put(a) for a in rng.standard_normal((2, 1000)).astype(np.float32))
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fused = fetch(opt.update(opt.setup(opt.Adam(), x, engine=engine), x, dx)[1])
        except Exception as error:  # noqa: BLE001 whatever is wrong is what was asked for
            return False, f"fails: {type(error).__name__}: {error}"
    seconds = time.perf_counter() - start
    plain = fetch(opt.update(opt.setup(opt.Adam(), x, engine="interpret"), x, dx)[1])
    ulps = float(np.max(np.abs(fused - plain) / np.spacing(np.abs(plain))))
    works = ulps <= SAME
    said = "".join(f"\n{'':<14}warning: {w.message}" for w in caught)
    verdict = "works" if works else "WRONG"
    return (
        works,
        f"{verdict}: within {ulps:g} ulp of the interpreter, {seconds:.2f} s for the first step{said}",
    )


if __name__ == "__main__":
    sys.exit(main())
