"""Builds the Cython extensions over the C core: one object per instruction set, each with its own flags.

Nothing is compiled for the building machine: which kernels run is decided at run time (src/system/cpu.c).
"""

from __future__ import annotations

import os
import platform
import re
import sys

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# What `layouts` links: the facts about types, experts and KV kinds, without the kernels.
LAYOUTS = ["src/weights/types.c", "src/weights/layout.c", "src/weights/expert.c", "src/kernels/kv.c"]
CORE = [
    *LAYOUTS,
    *("src/kernels/neurons.c", "src/kernels/ref.c"),
    *("src/paging/pager.c", "src/paging/eviction.c", "src/paging/reader.c", "src/paging/crc32.c"),
    *("src/system/cpu.c", "src/system/memory.c", "src/system/threads.c", "src/system/bandwidth.c"),
]
X86 = {
    "src/kernels/x86/avx2.c": ["-mavx2", "-mfma", "-mf16c"],
    "src/kernels/x86/avxvnni.c": ["-mavx2", "-mfma", "-mf16c", "-mavxvnni"],
    "src/kernels/x86/avx512vnni.c": [
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
    ],
}
ARM64 = {
    "src/kernels/arm/common.c": [],
    "src/kernels/arm/neon.c": [],
    "src/kernels/arm/dotprod.c": ["-march=armv8.2-a+dotprod"],
    "src/kernels/arm/i8mm.c": ["-march=armv8.2-a+dotprod+i8mm"],
}
KERNEL_FLAGS = {**X86, **ARM64}
# One binary for every later Python (3.11 and up: the first stable ABI with the buffer protocol); see docs/arm.md.
ABI3 = os.environ.get("SMALLTHINKER_ABI3") == "1"
# -ffp-contract=off: the plain-C kernels are the definition, so the compiler must not fuse their roundings.
FLAGS = ["-O3", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-pthread"]


def kernel_sources() -> list[str]:
    """The kernels of the target (not of the building machine: cross builds set _PYTHON_HOST_PLATFORM)."""
    target = os.environ.get("_PYTHON_HOST_PLATFORM") or platform.machine()
    if re.search(r"x86_64|amd64", target, re.IGNORECASE):
        return list(X86)
    # A 32-bit Python on a 64-bit kernel is told by its pointers.
    if re.search(r"aarch64|arm64", target, re.IGNORECASE) and (target != platform.machine() or sys.maxsize > 2**32):
        return list(ARM64)
    return []


class BuildExt(build_ext):
    """build_ext with per-file flags, and every C object compiled once for all extensions that share it."""

    def build_extensions(self) -> None:
        compile_one = self.compiler._compile
        done: set[str] = set()

        def compile_with_own_flags(obj, src, ext, cc_args, extra, pp_opts):  # type: ignore[no-untyped-def]
            path = os.path.relpath(src).replace(os.sep, "/")
            own = ["-Wno-unused-parameter", "-Wno-unused-function"] if "_native" in path else []
            if path not in done:
                compile_one(obj, src, ext, cc_args, [*extra, *own, *KERNEL_FLAGS.get(path, [])], pp_opts)
            if not own:
                done.add(path)

        self.compiler._compile = compile_with_own_flags
        super().build_extensions()


def extension(name: str, sources: list[str]) -> Extension:
    """One extension module of smallthinker_edge._native; missing .pyx files are an error of the checkout."""
    return Extension(
        f"smallthinker_edge._native.{name}",
        [f"smallthinker_edge/_native/{name}.pyx", *sources],
        include_dirs=["include"],
        depends=[os.path.join(d, f) for top in ("include", "src") for d, _, names in os.walk(top) for f in names],
        extra_compile_args=FLAGS,
        extra_link_args=["-pthread", "-lm"],
        define_macros=[("Py_LIMITED_API", "0x030B0000")] if ABI3 else [],
        py_limited_api=ABI3,
    )


core = CORE + kernel_sources()
QUANTIZE = ["src/weights/quantize.c", "src/weights/types.c"]
extensions = {
    **dict.fromkeys(("memory", "weights", "buffers", "paging", "kv_cache", "engine"), core),
    "kernels": core,
    "layouts": LAYOUTS,
    "quantize": QUANTIZE,
    "gguf": [],
    "sampler": [],
    "locks": [],
}
setup(
    ext_modules=cythonize(
        [extension(name, sources) for name, sources in extensions.items()],
        language_level=3,
        compiler_directives={"embedsignature": True, "freethreading_compatible": False},
    ),
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if ABI3 else {},
)
