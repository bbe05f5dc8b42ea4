"""Is a file what it says: read by others, whole whatever happens, and refused by name where it is damaged?"""

import json
import os
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

import optimisers as opt
from optimisers.checkpoint import about, files, threads
from optimisers.checkpoint import format as safetensors_format
from tests.damage import damaged, kept

SIZES: dict[str, tuple[int, ...]] = {"a": (300, 7), "b": (5,), "c": (), "d": (0, 3)}


def trained(seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    model: Any = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SIZES.items()}
    state = opt.setup(opt.Adam(), model)
    return opt.update_(state, model, {name: x + 1 for name, x in model.items()})


def test_the_loader_of_safetensors_reads_every_type(tmp_path: Path) -> None:
    names = [*safetensors_format.CODES, "complex128"]
    made = {n: np.arange(6).reshape(2, 3).astype(getattr(ml_dtypes, n, n)) for n in names}
    opt.save(tmp_path / "run", (), made)
    read = safetensors.numpy.load_file(tmp_path / "run")

    assert read.pop("bfloat16").astype(np.float32).tolist() == [[0, 1, 2], [3, 4, 5]]
    pairs = read.pop("complex128")
    np.testing.assert_array_equal(pairs.view(complex)[..., 0], made["complex128"])
    for name, x in read.items():
        assert x.dtype == name
        np.testing.assert_array_equal(x, made[name])
    back = {n: np.zeros_like(x) for n, x in made.items()}
    opt.load(tmp_path / "run", (), back)
    for name, x in made.items():
        assert back[name].tobytes() == x.tobytes(), name


def test_every_bit_of_bfloat16_goes_through(tmp_path: Path) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    opt.save(tmp_path / "run", (), {"x": bits.view(torch.bfloat16)})
    there = safetensors.torch.load_file(tmp_path / "run")["x"].view(torch.int16)
    back = {"x": torch.zeros(2**16, dtype=torch.bfloat16)}
    opt.load(tmp_path / "run", (), back)
    quiet = torch.isnan(bits.view(torch.bfloat16))  # the kind of a NaN is the machine's

    for found in (there, back["x"].view(torch.int16)):
        assert torch.equal(found[~quiet], bits[~quiet])
        assert torch.isnan(found.view(torch.bfloat16)[quiet]).all()


def test_arrays_laid_out_otherwise_are_written_as_they_read(tmp_path: Path) -> None:
    x = np.arange(24.0).reshape(2, 3, 4)
    model = {"t": x.transpose(2, 0, 1), "s": x.copy()[:, ::2], "big": x.astype(">f8"), "back": x.copy()[::-1]}
    opt.save(tmp_path / "run", (), model)
    read = safetensors.numpy.load_file(tmp_path / "run")

    for name, a in model.items():
        np.testing.assert_array_equal(read[name], a)


def test_rules_can_be_read_in_the_header(tmp_path: Path) -> None:
    state, model = trained()
    opt.save(tmp_path / "run", state, model)
    with safetensors.safe_open(tmp_path / "run", "numpy") as file:
        said = file.metadata()

    rules = json.loads(said["rules"])
    assert rules[0]["rule"] == "Adam(eta=0.001, beta=(0.9, 0.999), epsilon=1e-08)"
    assert rules[0]["names"] == ["a", "b", "c", "d"]
    assert opt.saved(tmp_path / "run").rules["b"] == rules[0]["rule"]


# -- whole or not at all -------------------------------------------------------------------------------------


def test_a_save_that_raises_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, model = trained()
    opt.save(tmp_path / "run", state, model)
    before = (tmp_path / "run").read_bytes()

    def full(*_: object) -> Iterator[Any]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        opt.save(tmp_path / "run", *trained(1))

    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run").read_bytes() == before


KILLED = """
import sys
from tests.damage import killed
sys.exit(killed(sys.argv[1], int(sys.argv[2]), shards=sys.argv[3] == "shards"))
"""


@pytest.mark.parametrize("form", ["one", "shards"])
def test_whoever_is_killed_leaves_the_old_or_the_new(tmp_path: Path, form: str) -> None:
    code = [sys.executable, "-c", KILLED, str(tmp_path), "15", form]
    root = Path(__file__).parents[2]
    done = subprocess.run(code, check=False, capture_output=True, text=True, timeout=300, cwd=root)

    assert done.returncode == 0, done.stderr


def test_what_killed_writers_have_left_is_taken_away(tmp_path: Path) -> None:
    state, model = trained()
    left, others = tmp_path / ".run.12345678.part", tmp_path / ".running.12345678.part"
    left.write_bytes(b"half")
    others.write_bytes(b"half")
    opt.save(tmp_path / "run", state, model)

    assert not left.exists()
    assert others.exists()


def test_a_file_that_another_one_writes_is_left_alone(tmp_path: Path) -> None:
    if os.name == "nt":
        pytest.skip("no locks of this kind there")
    state, model = trained()
    with files.replacing(tmp_path / "run") as file:
        file.write(b"theirs")
        opt.save(tmp_path / "run", state, model)
    assert (tmp_path / "run").read_bytes() == b"theirs"


def test_permissions_are_those_of_a_new_file_and_links_are_followed(tmp_path: Path) -> None:
    state, model = trained()
    (tmp_path / "real").write_bytes(b"")
    (tmp_path / "link").symlink_to("real")
    before = os.umask(0o027)
    try:
        opt.save(tmp_path / "link", state, model)
    finally:
        os.umask(before)

    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640
    assert opt.saved(tmp_path / "real").arrays


# -- several files -------------------------------------------------------------------------------------------


def test_a_large_checkpoint_is_several_files_with_the_usual_index(tmp_path: Path) -> None:
    state, model = trained()
    opt.save(tmp_path / "run.safetensors", state, model, max_shard_size="9KB", epoch=3)
    index = json.loads((tmp_path / "run.safetensors.index.json").read_text())
    arrays = {
        name: x
        for file in set(index["weight_map"].values())
        for name, x in safetensors.numpy.load_file(tmp_path / file).items()
    }

    assert len(set(index["weight_map"].values())) == 3
    assert index["weight_map"].keys() == arrays.keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in arrays.values())
    np.testing.assert_array_equal(arrays["a"], model["a"])
    for name in ("run.safetensors", "run.safetensors.index.json"):
        fresh, again = trained(1)
        opt.load(tmp_path / name, fresh, again)
        assert fresh == state
        assert opt.saved(tmp_path / name).more == {"epoch": 3}
    opt.save(tmp_path / "run.safetensors", *trained(2), max_shard_size=5000)
    parts = [*tmp_path.glob("*-of-*")]
    assert {int(part.stem[-5:]) for part in parts} == {len(parts)}
    opt.save(tmp_path / "run.safetensors", state, model)
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def test_parts_of_two_checkpoints_do_not_mix(tmp_path: Path) -> None:
    state, model = trained()
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        opt.save(tmp_path / folder / "run", state, model, max_shard_size="9KB")
    parts = [sorted((tmp_path / folder).glob("*-of-*")) for folder in ("one", "two")]
    with pytest.raises(opt.BadFile, match="is one part of a checkpoint"):
        opt.saved(parts[0][0])
    parts[0][1].write_bytes(parts[1][1].read_bytes())
    with pytest.raises(opt.BadFile, match="is not part 2 of 3"):
        opt.saved(tmp_path / "one" / "run")
    parts[0][1].unlink()
    with pytest.raises(opt.BadFile, match="which does not lie beside it"):
        opt.saved(tmp_path / "one" / "run")


@pytest.mark.parametrize("size", ["5", "GB", 0, -1, 1.5, "1 XB"])
def test_sizes_of_parts_are_checked(tmp_path: Path, size: Any) -> None:
    with pytest.raises(opt.BadSetting, match="max_shard_size is"):
        opt.save(tmp_path / "run", *trained(), max_shard_size=size)


def test_saving_and_loading_take_the_room_of_one_array(tmp_path: Path) -> None:
    model: Any = {f"w{i}": np.ones((64, 1024), np.float32) for i in range(12)}
    state = opt.setup(opt.Adam(), model)
    state, model = opt.update_(state, model, model)
    largest = model["w0"].nbytes
    opt.save(tmp_path / "run", state, model, max_shard_size="1MB")
    opt.load(tmp_path / "run", state, model)
    tracemalloc.start()
    try:
        opt.save(tmp_path / "run", state, model, max_shard_size="1MB")
        opt.load(tmp_path / "run", state, model)
        assert tracemalloc.get_traced_memory()[1] < 1.5 * largest + threads.CHUNK
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_what_is_loaded_where_it_lies_takes_no_room_at_all(kind: str, library: str, tmp_path: Path) -> None:
    model: Any = {"w": torch.ones(500_000, dtype=getattr(torch, kind)), "b": torch.ones(3)}
    if library == "numpy":
        model = {
            n: np.ones(x.shape, getattr(ml_dtypes, str(x.dtype)[6:], np.float32)) for n, x in model.items()
        }
    state = opt.setup(opt.Momentum(), model)
    opt.save(tmp_path / "run", state, model)
    opt.load(tmp_path / "run", state, model)
    tracemalloc.start()  # it counts NumPy's memory, into which files are read
    try:
        opt.load(tmp_path / "run", state, model)
        assert tracemalloc.get_traced_memory()[1] < threads.CHUNK + 200_000
    finally:
        tracemalloc.stop()


def test_several_threads_read_and_find_damage_as_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, model = trained()
    opt.save(tmp_path / "run", state, model)
    monkeypatch.setattr(threads, "SHARE", 1000)
    monkeypatch.setattr(threads, "CHUNK", 300)
    monkeypatch.setattr(safetensors_format, "SHARE", 1000)
    opt.set_num_threads(3)
    try:
        fresh, again = trained(1)
        opt.load(tmp_path / "run", fresh, again)
        assert kept(fresh, again) == kept(state, model)
        opt.save(tmp_path / "other", state, model)
        raw = bytearray((tmp_path / "run").read_bytes())
        assert raw == (tmp_path / "other").read_bytes()
        raw[len(raw) // 2] ^= 1
        (tmp_path / "run").write_bytes(raw)
        with pytest.raises(opt.BadFile, match="its checksum is that of other bytes"):
            opt.saved(tmp_path / "run")
    finally:
        opt.set_num_threads(None)


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (3, 7), (1, 4097), (4096, 65_537)])
def test_checksums_of_runs_are_joined(sizes: tuple[int, int]) -> None:
    first, second = (np.random.default_rng(n).bytes(n) for n in sizes)
    both = threads.joined(zlib.crc32(first), zlib.crc32(second), len(second))

    assert both == zlib.crc32(first + second)


# -- damage --------------------------------------------------------------------------------------------------


def test_no_damage_is_taken_for_a_checkpoint(tmp_path: Path) -> None:
    assert damaged(tmp_path, 300) == 0


def test_files_of_others_are_told_what_to_do(tmp_path: Path) -> None:
    state, model = trained()
    safetensors.numpy.save_file(opt.arrays(state, model), tmp_path / "theirs")
    with pytest.raises(opt.BadFile, match=r"theirs: it was not written by save.*opt\.from_arrays"):
        opt.load(tmp_path / "theirs", state, model)
    (tmp_path / "text").write_text("no")
    with pytest.raises(opt.BadFile, match="no file in the format of safetensors"):
        opt.load(tmp_path / "text", state, model)
    with pytest.raises(FileNotFoundError):
        opt.load(tmp_path / "absent", state, model)
    fresh, again = trained(1)
    read = safetensors.numpy.load_file(tmp_path / "theirs")
    assert opt.from_arrays(fresh, read, again)[0] == state


def test_versions_are_brought_up_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, model = trained()
    opt.save(tmp_path / "run", state, model, old=1)
    monkeypatch.setattr(about, "VERSION", 3)
    monkeypatch.setattr(
        about,
        "MIGRATIONS",
        {1: lambda said: said | {"more": '{"new": 1}'}, 2: lambda said: said | {"more": said["more"] + " "}},
    )
    assert opt.saved(tmp_path / "run").more == {"new": 1}
    opt.save(tmp_path / "run", state, model)
    monkeypatch.undo()
    with pytest.raises(opt.BadFile, match="it has version 3 of the format, and this release reads 1"):
        opt.load(tmp_path / "run", state, model)


def test_half_a_load_is_no_load(tmp_path: Path) -> None:
    state, model = trained()
    opt.save(tmp_path / "run", state, model)
    raw = bytearray((tmp_path / "run").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "run").write_bytes(raw)
    fresh, again = trained(1)
    before = kept(fresh, again)
    with pytest.raises(opt.BadFile, match="run: its checksum is that of other bytes"):
        opt.load(tmp_path / "run", fresh, again)
    assert kept(fresh, again) == before
