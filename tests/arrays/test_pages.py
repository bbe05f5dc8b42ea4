"""Large state of tensors is on pages of two megabytes, where Linux gives them."""

import mmap
import re
from pathlib import Path

import pytest

import optimisers as opt
from optimisers.arrays import pages
from optimisers.state.leaf import parts

torch = pytest.importorskip("torch")


def flags_at(address: int) -> str:
    """The flags that the system has noted for the memory at an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if (found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)) is not None:
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line
    return ""


@pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE") or not Path("/sys/kernel/mm/transparent_hugepage").is_dir(),
    reason="a system without pages of two megabytes",
)
def test_large_state_of_tensors_is_on_large_pages_and_small_state_is_not() -> None:
    model = [torch.ones(pages.LARGE // 2), torch.ones(1000)]
    state = opt.setup(opt.Momentum(0.1), model)
    (group,) = parts(state)[0].groups
    buffers = sorted(group.slots[0].buffers, key=lambda b: -b.nbytes)
    middle = buffers[0].data_ptr() + buffers[0].nbytes // 2
    assert " hg" in flags_at(middle)
    assert " hg" not in flags_at(buffers[1].data_ptr())
    assert not any(b.any() for b in buffers)


def test_memory_that_is_too_small_or_not_there_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(pages, "_advise", lambda: lambda start, size, _: asked.append((start, size)))
    pages.on_large_pages(mmap.PAGESIZE + 1, pages.LARGE - 1)
    pages.on_large_pages(mmap.PAGESIZE + 1, 2 * pages.LARGE)
    assert asked == [(2 * mmap.PAGESIZE, 2 * pages.LARGE - mmap.PAGESIZE)]
