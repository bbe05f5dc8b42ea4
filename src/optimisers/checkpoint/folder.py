"""The last few checkpoints of a run: which are kept, and from which does it go on?"""

import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple, final

from optimisers.checkpoint import files
from optimisers.checkpoint.files import File
from optimisers.checkpoint.save import save, taken
from optimisers.errors import BadFile, BadSetting

STEP = "step"
"""What the number of the step is called among what else is saved."""


class Resumed(NamedTuple):
    """Where a run goes on."""

    state: Any
    model: Any
    step: int
    """How many steps were taken; 0 where the run begins."""
    more: dict[str, Any]
    """What was given to `save` besides."""


@final
class Checkpoints:
    """The last `keep` checkpoints of one run, in a folder of its own, one after every `every` steps.

        kept = opt.Checkpoints("run", keep=3, every=1000)
        state, model, start, more = kept.resume(state, model)
        for step in range(start + 1, steps + 1):
            state, model = opt.update_(state, model, gradient(model, step))
            kept.after(step, state, model, best=best)

    `resume` goes on from the newest checkpoint that is whole: one that was damaged is passed by, with a
    warning. State, model and what else was saved are those of an uninterrupted run, to the bit. Each file is
    one of `opt.save`, in parts where `max_shard_size` says so; an old one is taken away when a new one is on
    the disk. Raises BadSetting for numbers below one.
    """

    def __init__(
        self, folder: File, *, keep: int = 3, every: int = 1, max_shard_size: int | str | None = None
    ) -> None:
        for name, number in (("keep", keep), ("every", every)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise BadSetting(f"{name} is {number!r}; it takes a whole number from 1 on")
        files.size_of(max_shard_size)
        self.folder, self.keep, self.every, self.max_shard_size = Path(folder), keep, every, max_shard_size

    def __repr__(self) -> str:
        return f"Checkpoints({str(self.folder)!r}, keep={self.keep}, every={self.every})"

    @property
    def files(self) -> dict[int, Path]:
        """The checkpoint after each step that has one, the oldest first."""
        found: dict[int, Path] = {}
        for path in self.folder.glob("step-*.safetensors*"):
            if name := re.fullmatch(rf"step-(\d+)\.safetensors({re.escape(files.INDEX)})?", path.name):
                found[int(name[1])] = self._file(int(name[1]))
        return dict(sorted(found.items()))

    def _file(self, step: int) -> Path:
        return self.folder / f"step-{step:010}.safetensors"

    def after(self, step: int, state: object, model: object = None, **more: object) -> Path | None:
        """Save after every `every`-th step; the file, or None after the others."""
        return self.save(step, state, model, **more) if step % self.every == 0 else None

    def save(self, step: int, state: object, model: object = None, **more: object) -> Path:
        """Save now, whatever the step, and take away what is too old."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(step)
        save(file, state, model, max_shard_size=self.max_shard_size, **more, **{STEP: step})
        older = [path for path in self.files.values() if path != file]
        for path in older[: len(older) + 1 - self.keep]:
            files.remove(path)
        return file

    def resume(self, state: Any, model: Any = None) -> Resumed:
        """Go on from the newest whole checkpoint, or begin where there is none; state and model come back as
        `load` gives them, with the number of steps that were taken and what else was saved.

        Raises TreeMismatch where the newest whole one is that of another model or of other rules.
        """
        for file in reversed(self.files.values()):
            try:
                found, held = taken(file, state, model)
            except (BadFile, FileNotFoundError) as error:
                warnings.warn(f"{error}; an older checkpoint is taken", stacklevel=2)
                continue
            new, made = (found, None) if model is None else found
            return Resumed(new, made, held.more.pop(STEP), held.more)
        return Resumed(state, model, 0, {})
