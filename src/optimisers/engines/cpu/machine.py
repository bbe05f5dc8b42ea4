"""LLVM on this machine: a module becomes object code, which may be kept on disk, and code in memory."""

import functools
import hashlib
import itertools
import weakref
from pathlib import Path
from typing import Any, final

import llvmlite
import llvmlite.binding as llvm
from llvmlite import ir

KEY = 16
"""Letters of what tells machines apart in names of files."""


@functools.cache
def _target() -> Any:
    """This processor, as LLVM knows it."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    x86 = llvm.get_process_triple().startswith(("x86", "i686"))
    return llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=_features(),
        opt=3,
        reloc="static" if x86 else "default",
        codemodel="jitdefault",
        jit=True,
    )


def _features() -> str:
    try:
        return llvm.get_host_cpu_features().flatten()
    except RuntimeError:  # not known of this processor
        return ""


VECTORS = (("avx512f", 64), ("avx", 32))
"""What a processor has -> bytes of its vectors."""


@functools.cache
def vector() -> int:
    """Bytes of the widest vectors of this processor. LLVM takes half of 64, for fear that the clock falls."""
    has = set(_features().split(","))
    return next((size for name, size in VECTORS if f"+{name}" in has), 16)


@functools.cache
def edition() -> str:
    """Tells object code of this processor, this LLVM and these files from that of others."""
    parts = (llvm.get_process_triple(), llvm.get_host_cpu_name(), _features(), llvmlite.__version__)
    files = (path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(" ".join((*parts, *files)).encode()).hexdigest()[:KEY]


def object_code(module: ir.Module) -> bytes:
    """What a module becomes, with loops made of vectors."""
    return _target().emit_object(optimised(module))


def optimised(module: ir.Module) -> Any:
    """A module as LLVM would have written it."""
    target = _target()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    options = llvm.create_pipeline_tuning_options()
    options.speed_level, options.loop_vectorization, options.slp_vectorization = 3, True, False
    builder = llvm.create_pass_builder(target, options)
    for function in parsed.functions:
        builder.getFunctionPassManager().run(function, builder)
    builder.getModulePassManager().run(parsed, builder)
    return parsed


@functools.cache
def _linker() -> Any:
    _target()
    return llvm.create_lljit_compiler()


_numbers = itertools.count()


@final
class Code:
    """Object code in memory, as long as this lives, and to the end of the process if it lives until then:
    other threads may run it.
    """

    def __init__(self, data: bytes, name: str) -> None:
        library = llvm.JITLibraryBuilder().add_object_img(data).add_current_process().export_symbol(name)
        tracker: Any = library.link(_linker(), f"optimisers_{next(_numbers)}")
        self.address: int = tracker[name]
        weakref.finalize(self, tracker.close).atexit = False
