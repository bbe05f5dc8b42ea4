"""Does `estimate` say what two and four processes send, and is the page about many devices current?"""

import math
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

import optimisers as opt
from docs.make_scale.__main__ import PAGE
from docs.make_scale.page import page
from tests.processes import found_by, run_as_two

RULES: dict[str, Any] = {
    "AdamW, clipped": opt.Chain(opt.ClipGlobalNorm(1.0), opt.AdamW(0.01)),
    "Muon, and AdamW": {opt.matrices: opt.Muon(0.02), "**": opt.AdamW(0.01)},
    "Muon, clipped": opt.Chain(opt.ClipGlobalNorm(1.0), opt.Muon(0.02)),
    "SOAP": opt.SOAP(0.01),
}

SHAPES: dict[str, tuple[int, ...]] = {
    "v": (7,),
    **{f"w{i}": (8, 12) for i in range(5)},
    **{f"x{i}": (12, 5) for i in range(3)},
    "y": (3, 4),
}

MATRICES = {k: s for k, s in SHAPES.items() if len(s) > 1}


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    return MATRICES if name in ("Muon, clipped", "SOAP") else SHAPES


def meshes(count: int) -> list[dict[str, int]]:
    return [{"shard": count}] + ([{"data": 2, "shard": 2}] if count == 4 else [])


def one_of(rank: int, folder: Path, count: int) -> None:
    """Count the bytes that one of the processes hands to collectives, and those of its state."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    torch.set_num_threads(1)
    sums: Any = dist.all_reduce
    parts: Any = dist.all_to_all_single
    counted = {"sums": 0, "parts": 0}

    def counting_sums(x: Any, *args: Any, **more: Any) -> Any:
        counted["sums"] += x.nbytes
        return sums(x, *args, **more)

    def counting_parts(out: Any, given: Any, received: Any, sizes: Any, **more: Any) -> Any:
        counted["parts"] += given.itemsize * (sum(sizes) - sizes[dist.get_rank()])
        return parts(out, given, received, sizes, **more)

    found: Any = {}
    try:
        for name, rule in RULES.items():
            for axes in meshes(count):
                mesh = init_device_mesh("cpu", tuple(axes.values()))
                there = [Replicate()] * (len(axes) - 1) + [Shard(0)]

                def spread(x: Any, mesh: Any = mesh, there: Any = there) -> Any:
                    return distribute_tensor(x, mesh, there, src_data_rank=None)

                model, grads = ({k: spread(torch.ones(s)) for k, s in shapes_of(name).items()} for _ in "12")
                state = opt.setup(rule, model)
                dist.all_reduce, dist.all_to_all_single = counting_sums, counting_parts
                counted.update(sums=0, parts=0)
                try:
                    opt.update_(state, model, grads)
                finally:
                    dist.all_reduce, dist.all_to_all_single = sums, parts
                held = [x for x in opt.arrays(state).values() if isinstance(x, DTensor)]
                size = sum(x.to_local().nbytes for x in held)
                found[f"{name} {axes}"] = torch.tensor([counted["sums"], counted["parts"], size])
    except Exception:  # noqa: BLE001 the test shows it
        found = traceback.format_exc()
    torch.save(found, folder / f"sent.{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo meets in a file of a POSIX system")
@pytest.mark.parametrize("count", [2, 4])
def test_processes_send_and_hold_what_estimate_says(count: int, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    run_as_two("tests.docs.test_scale", tmp_path, 240, ranks=count)
    every = [found_by(rank, "sent", tmp_path) for rank in range(count)]

    for name, rule in RULES.items():
        for axes in meshes(count):
            said = opt.estimate(rule, shapes_of(name), axes)
            most = torch.stack([e[f"{name} {axes}"] for e in every]).amax(0).tolist()
            assert [said.summed, said.exchanged, said.state_bytes] == most, (name, axes)


def test_the_page_about_many_devices_is_current() -> None:
    assert PAGE.read_text("utf-8") == page()


def test_an_estimate_counts_what_explain_counts() -> None:
    import numpy as np

    model = {k: np.zeros(s, np.float32) for k, s in SHAPES.items()}
    for rule in (RULES["AdamW, clipped"], RULES["Muon, and AdamW"]):
        costs, said = opt.explain(opt.setup(rule, model)).groups, opt.estimate(rule, SHAPES)

        assert said.parameters == sum(c.parameters for c in costs)
        assert said.state_bytes == sum(c.state_bytes for c in costs)
        assert said.flops == sum(c.flops for c in costs)
        assert (said.sent, said.summed, said.collectives) == (0, 0, 0)


def test_sizes_are_those_of_the_devices_with_most() -> None:
    said = opt.estimate(opt.Adam(), {"w": (10, 3)}, 4)

    assert said.parameter_bytes == 4 * 3 * math.ceil(10 / 4)
    assert opt.estimate(opt.Adam(), {"w": (10, 3)}, {"data": 4}).parameter_bytes == 4 * 30
    assert said.state_bytes == 2 * said.parameter_bytes


def test_a_model_of_a_trillion_parameters_takes_no_memory() -> None:
    program = (
        "import resource\nimport optimisers as opt\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "shapes = {f'w{i}': (100_000, 100_000) for i in range(100)}\n"
        "for rule in (opt.MixedPrecision(opt.AdamW()), opt.Shampoo(), opt.Muon()):\n"
        "    opt.estimate(rule, shapes, 4096, dtype='float16')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(out) * unit < 200e6


def test_models_of_shapes_alone_are_estimated() -> None:
    wanted = opt.estimate(opt.Muon(), MATRICES, 4)
    jax = pytest.importorskip("jax")
    torch = pytest.importorskip("torch")
    forms = {k: jax.ShapeDtypeStruct(s, "float32") for k, s in MATRICES.items()}
    tensors = {k: torch.empty(s, device="meta") for k, s in MATRICES.items()}

    assert opt.estimate(opt.Muon(), forms, 4) == wanted
    assert opt.estimate(opt.Muon(), tensors, 4) == wanted


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mesh": 0}, "mesh=0"),
        ({"mesh": {"shard": 1.5}}, "mesh="),
        ({"link": 0}, "link=0"),
        ({"dtype": "q"}, "'q'"),
    ],
)
def test_an_estimate_refuses_what_makes_no_sense(given: dict[str, Any], said: str) -> None:
    with pytest.raises(opt.BadSetting, match=said):
        opt.estimate(opt.Adam(), SHAPES, **given)


if __name__ == "__main__":
    one_of(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
