"""How does a file come to be whole? Beside the old one, and in its place only when all of it is on the disk.

A process that is killed at any instant leaves the old file or the new, and perhaps a file on its way, which
the next one to write here takes away. Large checkpoints lie in several files; then the index that names them
is what is replaced, and no name of a part is used twice.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import re
import secrets
from collections.abc import Generator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np

from optimisers.arrays.protocol import HostArray
from optimisers.checkpoint import format as safetensors
from optimisers.checkpoint.format import Form, Header
from optimisers.checkpoint.threads import side_by_side
from optimisers.errors import BadFile, BadSetting

File = str | os.PathLike[str]

INDEX = ".index.json"
"""Behind the name of a checkpoint in parts, that of its index."""

_locks: Any = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None


# -- one file ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(target: Path) -> Generator[BinaryIO]:
    """A file that takes the place of another when the block ends, and not if it raises."""
    _sweep(target)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    with temporary.open("xb", buffering=1 << 20) as file:
        _hold(file)
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    settle(target.parent)


def settle(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    if os.name == "nt":  # folders cannot be opened there, and renaming waits for the disk
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _hold(file: BinaryIO) -> None:
    """Mark a file as being written, as long as this process lives."""
    if _locks is not None:
        with contextlib.suppress(OSError):  # not every file system has locks
            _locks.flock(file.fileno(), _locks.LOCK_EX | _locks.LOCK_NB)


def _sweep(target: Path) -> None:
    """Take away what processes that were killed have left on the way to a file."""
    if _locks is None:
        return
    for left in target.parent.glob(f".{_literal(target.name)}.*.part"):
        with contextlib.suppress(OSError), left.open("rb") as file:
            _locks.flock(file.fileno(), _locks.LOCK_EX | _locks.LOCK_NB)
            left.unlink()


def _literal(name: str) -> str:
    """A name as a glob that matches it alone."""
    return re.sub(r"([\[*?])", r"[\1]", name)


# -- a checkpoint --------------------------------------------------------------------------------------------


def write(
    file: File,
    forms: Mapping[str, Form],
    about: Mapping[str, str],
    data: Mapping[str, Any],
    limit: int | None = None,
) -> None:
    """Write a checkpoint: of arrays of these forms, which `data` gives one by one; in parts of at most
    `limit` bytes of elements where there are more.
    """
    target = Path(os.path.realpath(file))
    names = safetensors.ordered(forms)
    parts = [names] if limit is None else _divided(names, forms, limit)
    if len(parts) == 1:
        with replacing(target) as one:
            _fill(one, names, forms, about, data)
        _forget(target, keep=set())
        return
    stem, token = target.name.removesuffix(".safetensors"), secrets.token_hex(4)
    where: dict[str, str] = {}
    for n, part in enumerate(parts):
        name = f"{stem}-{token}-{n + 1:05}-of-{len(parts):05}.safetensors"
        said = {"part": f"{n + 1} of {len(parts)} of {token}", **(about if n == 0 else {})}
        with replacing(target.with_name(name)) as one:
            _fill(one, part, forms, said, data)
        where |= dict.fromkeys(part, name)
    index = {
        "metadata": {"total_size": sum(form.bytes for form in forms.values()), "checkpoint": token},
        "weight_map": where,
    }
    with replacing(target.with_name(target.name + INDEX)) as one:
        one.write(json.dumps(index, indent=1).encode())
    target.unlink(missing_ok=True)
    _forget(target, keep={*where.values(), target.name + INDEX})


def _fill(
    file: BinaryIO,
    names: Sequence[str],
    forms: Mapping[str, Form],
    about: Mapping[str, str],
    data: Mapping[str, Any],
) -> None:
    """Write some of the arrays into one file."""
    safetensors.write(file, {name: forms[name] for name in names}, about, (data[name] for name in names))


def _divided(names: Sequence[str], forms: Mapping[str, Form], limit: int) -> list[list[str]]:
    """Names in parts of at most `limit` bytes each; an array that is larger is alone."""
    parts: list[list[str]] = [[]]
    room = limit
    for name in names:
        if parts[-1] and forms[name].bytes > room:
            parts.append([])
            room = limit
        parts[-1].append(name)
        room -= forms[name].bytes
    return parts


def remove(target: Path) -> None:
    """Take a checkpoint away, in one file or in several."""
    target.unlink(missing_ok=True)
    _forget(target, keep=set())


def _forget(target: Path, keep: set[str]) -> None:
    """Take away the index and the parts of checkpoints that were here before."""
    stem = _literal(target.name.removesuffix(".safetensors"))
    index = target.with_name(target.name + INDEX)
    if index.name not in keep:
        index.unlink(missing_ok=True)
    of_parts = re.compile(r"-[0-9a-f]{8}-\d{5}-of-\d{5}\.safetensors$")
    for old in target.parent.glob(f"{stem}-????????-?????-of-?????.safetensors"):
        if old.name not in keep and of_parts.search(old.name):
            old.unlink(missing_ok=True)


UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1}


def size_of(text: int | str | None) -> int | None:
    """A number of bytes, given as one or as text such as "5GB"; raises BadSetting for anything else."""
    if isinstance(text, str):
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?B)", text)
        if found is not None:
            return max(1, int(float(found[1]) * UNITS[found[2]]))
    elif text is None or (isinstance(text, int) and text > 0):
        return text
    raise BadSetting(f'max_shard_size is {text!r}; it takes a number of bytes, or text such as "5GB"')


class Part(NamedTuple):
    """One open file of a checkpoint."""

    file: FileIO
    header: Header


class Reader:
    """A checkpoint that was looked through: what is in it, and its arrays one by one.

    Raises BadFile, with the name of the file, for one that is damaged.
    """

    def __init__(self, file: File) -> None:
        self.path = Path(os.fspath(file))
        self.parts: dict[str, Part] = {}
        """The file of every array."""
        self.about: dict[str, str] = {}
        self.forms: dict[str, Form] = {}
        self.open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        try:
            index = Path(f"{self.path}{INDEX}")
            if self.path.name.endswith(INDEX):
                self._indexed(self.path)
            elif not self.path.exists() and index.exists():
                self._indexed(index)
            else:
                self._add(self.path)
                self._refuse_part()
        except BaseException:
            self.open.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.open.close()

    def read(self, name: str) -> Any:
        """An array, as one of NumPy; bfloat16 as ml_dtypes has it where that is there, else in single
        precision.
        """
        part, form = self.parts[name], self.forms[name]
        found = safetensors.read(part.file, part.header, name)
        return safetensors.widened(found) if form.type == "bfloat16" else found

    def fill(self, targets: Sequence[tuple[str, HostArray]]) -> None:
        """Read arrays into memory of the host that has their shapes and types, bfloat16 as its bits."""

        def one(target: tuple[str, HostArray]) -> None:
            safetensors.fill(*self.parts[target[0]], *target)

        side_by_side(one, targets, sum(x.nbytes for _, x in targets))

    def view(self, name: str) -> Any:
        """An array where it lies in the file, which is read when it is looked at; bfloat16 as its bits."""
        part, form = self.parts[name], self.forms[name]
        kind = "uint16" if form.type == "bfloat16" else form.type
        if not form.bytes:
            return np.empty(form.shape, kind)
        return np.memmap(part.file, kind, "c", part.header.offsets[name], form.shape or 1).reshape(form.shape)

    def _add(self, path: Path) -> str:
        """Take one file in; what it says of which part it is."""
        file = self.open.enter_context(FileIO(path))
        try:
            header = safetensors.checked(file)
        except BadFile as error:
            raise BadFile(f"{path}: {error}") from error
        about = dict(header.about)
        said = about.pop("part", "")
        if both := header.forms.keys() & self.forms.keys():
            raise BadFile(f"{path} has {min(both)!r}, which another part has too")
        self.about |= about
        self.forms |= header.forms
        self.parts |= dict.fromkeys(header.forms, Part(file, header))
        return said

    def _refuse_part(self) -> None:
        """Raise BadFile for one file of several."""
        if any("part" in part.header.about for part in self.parts.values()):
            raise BadFile(f"{self.path} is one part of a checkpoint; open it by the name it was saved under")

    def _indexed(self, index: Path) -> None:
        """Take in all files of an index."""
        try:
            said: Any = json.loads(index.read_bytes())
            where, about = said["weight_map"], said["metadata"]
            token, total = about["checkpoint"], about["total_size"]
            files = list(dict.fromkeys(where.values()))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise BadFile(f"{index} cannot be read as the index of a checkpoint: {error!r}") from error
        for n, name in enumerate(files):
            path = index.parent / str(name)
            if path.parent != index.parent or not path.is_file():
                raise BadFile(f"{index} names {name!r}, which does not lie beside it")
            if self._add(path) != f"{n + 1} of {len(files)} of {token}":
                raise BadFile(f"{path} is not part {n + 1} of {len(files)} of the checkpoint of {index}")
        held = {name: Path(part.file.name).name for name, part in self.parts.items()}
        if held != where or total != sum(form.bytes for form in self.forms.values()):
            raise BadFile(f"{index} speaks of other arrays than its files hold")
