"""All roads to the addresses of arrays give one answer, and say which is taken."""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import optimisers as opt
from optimisers.arrays.layout import contiguous_strides
from optimisers.engines.addressed import objects, pointers, public

PUBLIC = {
    "numpy": pointers.Road(None, public.numpy_addresses, "asked for"),
    "torch": pointers.Road(None, public.torch_addresses, "asked for"),
}


class Labelled(np.ndarray[Any, Any]):
    """A subclass."""


def zoo(library: str) -> list[Any]:
    """Arrays of 2 x 3 elements, plain and odd."""
    if library == "numpy":
        locked = np.zeros((2, 3), np.float32)
        locked.flags.writeable = False
        shifted = np.frombuffer(bytearray(25), np.uint8)[1:].view(np.float32).reshape(2, 3)
        return [
            np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32).T, np.zeros((2, 3)), locked, shifted,
            np.zeros((4, 3), np.float32)[::2], np.zeros((3, 3), np.float32), np.zeros((2, 3), ">f4"),
            np.zeros((2, 3), np.float32).view(Labelled), np.zeros((2, 1, 3), np.float32),
            np.broadcast_to(np.zeros(3, np.float32), (2, 3)), np.zeros((4, 3), np.float32)[1:3],
        ]  # fmt: skip
    shrunk = torch.zeros(2, 3)
    shrunk.untyped_storage().resize_(8)
    functional: Any = torch._to_functional_tensor(torch.zeros(2, 3))
    with torch.inference_mode():
        inference = torch.zeros(2, 3)
    return [
        torch.zeros(2, 3), torch.nn.Parameter(torch.zeros(2, 3)), torch.zeros(3, 2).T, torch.zeros(4, 3)[1:3],
        torch.zeros(2, 3, dtype=torch.float64), torch.zeros(4, 3)[::2], torch.zeros(3, 3), inference,
        torch.zeros(2, 3).to_sparse(), torch.zeros(2, 3, device="meta"), functional, shrunk,
        torch._neg_view(torch.zeros(2, 3)), torch.zeros(3).expand(2, 3), torch.nn.Buffer(torch.zeros(2, 3)),
    ]  # fmt: skip


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("write", [False, True])
def test_all_roads_give_one_answer_for_odd_arrays(
    library: str, write: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = pointers.road(library, "cpu")
    assert raw is not None
    assert raw.look is not None
    dtype: Any = np.dtype(np.float32) if library == "numpy" else torch.float32
    fitting = 0
    for odd in zoo(library):
        if library == "torch" and not write and odd.is_inference():
            continue  # may be read, which only the public road makes use of
        given = [zoo(library)[0], odd, zoo(library)[0]]
        shapes = [(2, 3)] * 3
        answers: list[tuple[list[int], list[int]]] = []
        for taken, exchange in ((raw, True), (PUBLIC[library], True), (PUBLIC[library], False)):
            pointers.choose(library, "cpu", taken)
            if not exchange:  # as with a PyTorch that has none
                monkeypatch.setattr(public, "_asker", lambda _device: None)
            form = pointers.Form(library, "cpu", shapes, [contiguous_strides((2, 3))] * 3, [True] * 3)
            for _ in range(3):
                at, misfit = np.zeros(3, np.int64), np.zeros(3, np.int64)
                at, misfits = form.addresses(given, dtype, at, misfit, write=write, name="x")
                fit = [k for k in range(3) if k not in misfits.tolist()]
                answers.append((misfits.tolist(), at[fit].tolist()))
        monkeypatch.undo()
        pointers.choose(library, "cpu", raw)
        assert all(answer == answers[0] for answer in answers), (type(odd), answers)
        fitting += 1 not in answers[0][0]

    assert 2 <= fitting < len(zoo(library)) - 3


def test_the_exchange_of_pytorch_is_taken() -> None:
    assert public._asker("cpu") is not None


@pytest.fixture(params=[True, False], ids=["exchange", "attributes"])
def public_road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors are asked where they lie: by the exchange of PyTorch, or as with a PyTorch that has none."""
    if not request.param:
        monkeypatch.setattr(public, "_asker", lambda _device: None)
    raw = pointers.road("torch", "cpu")
    assert raw is not None
    pointers.choose("torch", "cpu", PUBLIC["torch"])
    yield
    pointers.choose("torch", "cpu", raw)


@pytest.mark.usefixtures("public_road")
def test_a_tensor_that_changed_behind_its_object_is_seen() -> None:
    for change in (
        lambda x: setattr(x, "data", torch.zeros(3, 3)),
        lambda x: setattr(x, "data", x.data[:1]),
        lambda x: setattr(x, "data", x.data.t()),
        lambda x: setattr(x, "data", x.data.view(3, 2)),
        lambda x: setattr(x, "data", x.data.view(6)),
        lambda x: setattr(x, "data", x.data.double()),
        lambda x: x.untyped_storage().resize_(0),
    ):
        x = torch.zeros(2, 3)
        state = opt.setup(opt.Descent(0.5), {"x": x})
        for _ in range(4):
            opt.update_(state, {"x": x}, {"x": torch.ones(2, 3)})
        change(x)
        with pytest.raises(opt.TreeMismatch):
            opt.update_(state, {"x": x}, {"x": torch.ones(2, 3)})


@pytest.mark.usefixtures("public_road")
def test_a_tensor_that_became_a_negated_or_conjugated_view_is_seen() -> None:
    """A negated view is the imaginary part of a conjugate: in the place of what it was made of it is dense
    where it is one number, or another object.
    """
    turned: list[tuple[tuple[int, int], Callable[[Any], Any], Callable[[Any], Any]]] = [
        ((1, 1), lambda z: z.imag, lambda z: z.conj().imag),
        ((2, 3), lambda z: z, lambda z: z.conj()),
    ]
    for shape, before, after in turned:
        bases = [torch.full(shape, 1 + 2j), torch.full(shape, 3 + 4j)]
        x, g = map(before, bases)
        state = opt.setup(opt.Descent(0.5), [x])
        for _ in range(4):
            opt.update_(state, [x], [g])
        for written, base in ((g, bases[1]), (x, bases[0])):
            at = written.data_ptr()
            written.data = after(base)
            assert written.data_ptr() == at
            expected = x.clone() - 0.5 * g
            opt.update_(state, [x], [g])
            torch.testing.assert_close(x.clone(), expected)


@pytest.mark.usefixtures("public_road")
def test_plain_tensors_are_never_asked_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any, **__: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(pointers.Form, "asked", asked)
    for dtype in (torch.float32, torch.complex64):
        for shapes in ([(2, 3), (4,)], [(1,), (), (3, 1)]):
            model = [torch.zeros(s, dtype=dtype) for s in shapes]
            state = opt.setup(opt.AdamW(0.1), model)
            kept = [torch.ones(s, dtype=dtype) for s in shapes]
            for n in range(5):
                opt.update_(state, model, kept if n < 3 else [g.clone() for g in kept])


@pytest.mark.usefixtures("public_road")
def test_a_negated_gradient_in_another_object_is_seen_wherever_it_lies() -> None:
    x, g = torch.zeros(2, 3), torch.ones(2, 3)
    state = opt.setup(opt.Descent(0.5), [x])
    for gradient in (g, g, g, torch._neg_view(g), g, torch._neg_view(g)):
        expected = x.clone() - 0.5 * gradient
        opt.update_(state, [x], [gradient])
        torch.testing.assert_close(x, expected)


def test_untested_versions_and_the_switch_take_the_public_road(monkeypatch: pytest.MonkeyPatch) -> None:
    assert objects.refusal("torch") is None
    monkeypatch.setitem(objects.TESTED, "torch", "1[.]")
    assert "is not a tested version" in (objects.refusal("torch") or "")
    monkeypatch.setattr(objects, "switch", lambda: "1")
    assert objects.refusal("torch") is None
    monkeypatch.setattr(objects, "switch", lambda: "0")
    assert objects.refusal("numpy") == "OPTIMISERS_RAW_READS=0"


@pytest.mark.slow
def test_explain_says_that_reading_is_switched_off() -> None:
    code = """
import numpy as np, optimisers as opt
x = np.ones((3, 2), np.float32)
state, x = opt.update_(opt.setup(opt.Descent(0.5), x), x, x.copy())
assert (x == 0.5).all()
said = str(opt.explain(state))
assert "addresses are asked of the arrays (OPTIMISERS_RAW_READS=0)" in said, said
"""
    environment = os.environ | {"OPTIMISERS_RAW_READS": "0"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    assert ended.returncode == 0, ended.stderr
