"""What can happen to a checkpoint: a writer that is killed, a file that is damaged. `python -m
benchmarks.checkpoints` lets it happen thousands of times.
"""

import json
import os
import random
import signal
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import optimisers as opt
from optimisers.checkpoint import format as safetensors

# -- killed writers ------------------------------------------------------------------------------------------


def _checkpoint(seed: int, size: int) -> tuple[Any, Any]:
    """A model whose every number is its seed, and its state."""
    model: Any = {name: np.full(size, seed, np.float32) for name in ("a", "b", "c")}
    return opt.setup(opt.Adam(), model), model


def _whole(file: Path, old: int, new: int, size: int) -> bool:
    """Whether a file is the old checkpoint or the new one."""
    state, model = _checkpoint(-1, size)
    opt.load(file, state, model)
    epoch = opt.saved(file).more["epoch"]
    return epoch in (old, new) and all((x == epoch).all() for x in model.values())


def killed(folder: str, times: int, *, shards: bool = False, size: int = 20_000) -> int:
    """Kill as many writers, each at an instant of its own; how many checkpoints were lost."""
    file, lost, rng = Path(folder) / "run.safetensors", 0, random.Random(0)  # noqa: S311 no secret
    limit = 4 * size if shards else None
    state, model = _checkpoint(0, size)
    start = time.perf_counter()
    opt.save(file, state, model, epoch=0, max_shard_size=limit)
    took, old = time.perf_counter() - start, 0
    for n in range(1, times + 1):
        state, model = _checkpoint(n, size)
        child = os.fork()
        if child == 0:
            while True:  # until it is killed
                opt.save(file, state, model, epoch=n, max_shard_size=limit)
        time.sleep(rng.random() * 2 * took)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        try:
            whole = _whole(file, old, n, size)
            old = opt.saved(file).more["epoch"]
        except (opt.OptimiserError, OSError):
            whole = False
        lost += not whole
    return lost


# -- damaged files -------------------------------------------------------------------------------------------


def kept(state: Any, model: Any) -> dict[str, bytes]:
    """All of a state and a model by its bytes."""
    return {name: x.tobytes() for name, x in opt.arrays(state, model).items()}


def _small(seed: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    model: Any = {"w": rng.standard_normal((4, 3)), "b": rng.standard_normal(3)}
    return opt.update_(opt.setup(opt.AdamW(opt.Cosine(0.1, 9)), model), model, model)


def _flip(rng: random.Random, raw: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 2, 9))):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)


def _cut(rng: random.Random, raw: bytearray) -> None:
    del raw[rng.randrange(len(raw)) :]


def _grow(rng: random.Random, raw: bytearray) -> None:
    raw += rng.randbytes(rng.choice((1, 8, 1000)))


def _swap(rng: random.Random, raw: bytearray) -> None:
    a, b, n = rng.randrange(len(raw)), rng.randrange(len(raw)), rng.choice((1, 8, 64))
    raw[a : a + n], raw[b : b + n] = raw[b : b + n], raw[a : a + n]


VALUES = (
    None,
    -1,
    0,
    1,
    2**63,
    1e300,
    True,
    "",
    "F32",
    "x" * 999,
    [],
    {},
    [[]],
    [-1, 4],
    [0, 2**70],
    "[" * 5000,
)


def _fuzz(rng: random.Random, raw: bytearray) -> None:
    """Change something in the header, and make the checksum right again, as who forges a file does."""
    length = int.from_bytes(raw[:8], "little")
    said = json.loads(raw[8 : 8 + length])
    where: Any = said
    while True:
        key = rng.choice([*where] if isinstance(where, dict) else [*range(len(where))])
        if not (isinstance(where[key], dict | list) and where[key] and rng.random() < 0.8):
            break
        where = where[key]
    if rng.random() < 0.2 and isinstance(where, dict):
        del where[key]
    elif isinstance(where[key], str) and where[key][:1] in "[{" and rng.random() < 0.7:
        text = bytearray(where[key].encode())
        _flip(rng, text)
        where[key] = text.decode(errors="replace")
    else:
        where[key] = rng.choice(VALUES)
    head = json.dumps(said, separators=(",", ":")).encode()
    raw[:] = len(head).to_bytes(8, "little") + head + raw[8 + length :]
    at = 8 + len(safetensors.START)
    if bytes(raw[8:at]) == safetensors.START:
        raw[at : at + 8] = b"00000000"
        raw[at : at + 8] = f"{zlib.crc32(raw):08x}".encode()


def _empty(rng: random.Random, raw: bytearray) -> None:
    raw[:] = rng.randbytes(rng.choice((0, 3, 8, 500)))


WAYS: tuple[Callable[[random.Random, bytearray], None], ...] = (
    _flip,
    _cut,
    _grow,
    _swap,
    _fuzz,
    _fuzz,
    _empty,
)


def damaged(folder: Path, times: int, seed: int = 0) -> int:
    """How many of as many damaged files were no named error and no state as it was saved, or half a load."""
    file, rng = folder / "run", random.Random(seed)  # noqa: S311 no secret
    old, old_model = _small(0)
    opt.save(file, old, old_model, epoch=1)
    whole, wanted, lost = file.read_bytes(), kept(old, old_model), 0
    state, model = _small(1)
    before = kept(state, model)
    for _ in range(times):
        raw = bytearray(whole)
        way = rng.choice(WAYS)
        way(rng, raw)
        file.write_bytes(raw)
        try:
            opt.load(file, state, model)
        except (opt.BadFile, opt.TreeMismatch):
            lost += kept(state, model) != before
            continue
        found = kept(state, model)
        forged = way is _fuzz  # whose metadata need not be what was saved: it is no damage that can be seen
        lost += found.keys() != wanted.keys() or (found != wanted and not forged)
        state, model = _small(1)
    return lost
