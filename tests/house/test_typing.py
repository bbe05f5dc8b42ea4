"""What does a type checker know of the public functions? Asked of pyright, in a file of a user."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RIGHT = """
import numpy as np
import optimisers as opt
from typing import Any, assert_type

class Net:
    w: Any
    def forward(self) -> float:
        return 0.0

class Mine(opt.Rule):
    eta: float = 0.1
    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return state, self.eta * dx

class Scheduled(opt.Rule):
    eta: opt.Setting = opt.setting(0.1)
    beta: opt.Pair = opt.setting((0.9, 0.999))

model = Net()
state = opt.setup(opt.AdamW(opt.Cosine(0.01, 1000, warmup=100), lam=0.1), model)
assert_type(state, opt.State)
assert_type(opt.update(state, model, model), tuple[opt.State, Net])
assert_type(opt.update_(state, model, model), tuple[opt.State, Net])
assert_type(opt.freeze(opt.adjust(state, 0.1), where="w"), opt.State)
assert_type(opt.adjust(opt.Adam(), 0.1), opt.Adam)
opt.freeze_(state.layers[3])
opt.adjust_(state["w"], lam=0.0)
print(state.frozen, state.layers[0].rule.eta)

opt.Descent(lambda clock: 0.1 / opt.sqrt(clock + 1))
opt.Adam(0.1, beta=(opt.Linear(0.8, 0.9, 100), 0.999))
opt.Adam(np.float32(0.1))
opt.setup({"**.b": opt.Descent(1), "**": None}, model)
opt.setup({opt.vectors: opt.Adam(), opt.matrices & ~opt.by_path("a"): None, "**": opt.Descent()}, model)
assert_type(opt.hidden_matrices | "head.**", opt.Selector)
opt.freeze_(state, opt.by_type(Net))
with opt.averaged_(state, model) as evaluated:
    print(evaluated)
opt.setup(opt.layer_decay({opt.vectors: opt.Adam(), "**": None}, 0.75, layer=lambda path: len(path)), model)
opt.setup(lambda path, x: opt.Adam() if len(path) else None, model)
Mine(0.1)
Scheduled(opt.Cosine(0.1, 10), (0.9, opt.Linear(0.8, 0.9, 100)))
assert_type(Scheduled().eta, float)
assert_type(Scheduled().beta, tuple[float, float])
"""

WRONG = (
    'opt.Adam("fast")',
    "opt.Adam(beta=0.9)",
    "opt.Adam(lr=0.1)",
    "opt.setup(opt.Adam, {})",
    "opt.freez(1)",
    "opt.by_type('Linear')",
    "opt.matrices & 3",
)


def errors(code: str, folder: Path) -> list[dict[str, Any]]:
    """What pyright finds in a file with this code."""
    file = folder / "user.py"
    file.write_text(code)
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    return json.loads(done.stdout)["generalDiagnostics"]


@pytest.mark.slow
def test_what_the_docs_show_is_right_to_a_type_checker_and_models_keep_their_type(tmp_path: Path) -> None:
    assert errors(RIGHT, tmp_path) == []


@pytest.mark.slow
def test_what_is_wrong_is_wrong_to_a_type_checker_too(tmp_path: Path) -> None:
    code = "import optimisers as opt\n" + "\n".join(WRONG)
    found = errors(code, tmp_path)

    lines = sorted({e["range"]["start"]["line"] for e in found})
    assert lines == list(range(1, len(WRONG) + 1))
