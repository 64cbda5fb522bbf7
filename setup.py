"""Builds one shared object of all Cython modules and the C core, each source with flags of its own.

Nothing is compiled for the building machine: which kernels run is decided at run time (src/system/cpu.c).
"""

from __future__ import annotations

import os
import platform
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CORE = sorted(glob("src/*/*.c"))  # kernels of instruction sets lie a folder deeper
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
# Those that GCC before 11 (or 8, 10) does not know: the build goes on without such a table (src/system/cpu.c).
OPTIONAL = ("src/kernels/x86/avx512vnni.c", "src/kernels/x86/avxvnni.c", "src/kernels/arm/i8mm.c")
# One binary for every later Python (3.11 and up: the first stable ABI with the buffer protocol); see docs/arm.md.
ABI3 = os.environ.get("SMALLTHINKER_ABI3") == "1"
# -ffp-contract=off: the plain-C kernels are the definition, so the compiler must not fuse their roundings.
FLAGS = ["-O3", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-pthread"]
FLAGS += ["-D_FILE_OFFSET_BITS=64"]  # models beyond 2 GiB on 32-bit systems


TARGET = os.environ.get("_PYTHON_HOST_PLATFORM") or platform.machine()  # which cross builds set


def kernel_sources() -> list[str]:
    """The kernels of the target, not of the building machine."""
    if re.search(r"x86_64|amd64", TARGET, re.IGNORECASE):
        return list(X86)
    # A 32-bit Python on a 64-bit kernel is told by its pointers.
    if re.search(r"aarch64|arm64", TARGET, re.IGNORECASE) and (platform.machine() != TARGET or sys.maxsize > 2**32):
        return list(ARM64)
    return []


def cython_flags(source: str) -> list[str]:
    """For what Cython writes: functions and parameters that nothing uses and, for the stable ABI, one helper that is
    not static (Cython 3.3), so that two modules in one object would both define it."""
    helper = "__Pyx_ApplySequenceOrMappingFlag"
    module = os.path.splitext(os.path.basename(source))[0]
    renamed = [f"-D{helper}={helper}_{module}"] if ABI3 else []
    return ["-Wno-unused-parameter", "-Wno-unused-function", *renamed]


class BuildExt(build_ext):
    """build_ext that compiles each source with its own flags, on all cores, and only where something is newer."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:  # not in a folder that pip throws away: later builds compile only what changed
            tag = f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
            self.build_temp = os.path.join("build", tag)
        if ABI3:
            self.build_temp += "-abi3"

    def build_extension(self, ext: Extension) -> None:
        for source in [source for source in OPTIONAL if source in ext.sources]:
            if not self.compiles_with(KERNEL_FLAGS[source]):
                name = os.path.splitext(os.path.basename(source))[0]
                self.warn(f"this compiler has no {' '.join(KERNEL_FLAGS[source])}: the kernel table {name} is left out")
                ext.sources.remove(source)
                ext.define_macros.append((f"ST_WITHOUT_{name.upper()}", None))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: self.compile_source(source, ext), ext.sources))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=ext.extra_link_args,
            build_temp=self.build_temp,
            target_lang="c",
        )

    def compiles_with(self, flags: list[str]) -> bool:
        """Whether the compiler knows the flags."""
        with tempfile.TemporaryDirectory() as folder:
            probe = os.path.join(folder, "probe.c")
            with open(probe, "w") as file:
                file.write("int probe;\n")
            try:
                self.compiler.compile([probe], output_dir=folder, extra_postargs=flags)
            except CompileError:
                return False
        return True

    def compile_source(self, source: str, ext: Extension) -> str:
        """The object of a source, made anew where that, a header or this file has changed."""
        (made,) = self.compiler.object_filenames([source], output_dir=self.build_temp)
        os.makedirs(os.path.dirname(made), exist_ok=True)  # setuptools' own way is not safe from several threads
        newest = max(os.path.getmtime(path) for path in [source, *ext.depends])
        if self.force or not os.path.exists(made) or os.path.getmtime(made) <= newest:
            own = cython_flags(source) if "_native" in source else KERNEL_FLAGS.get(source.replace(os.sep, "/"), [])
            self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=ext.define_macros,
                include_dirs=ext.include_dirs,
                extra_postargs=[*ext.extra_compile_args, *own],
            )
        return str(made)


modules = cythonize(
    [
        Extension(f"smallthinker_edge._native.{os.path.splitext(os.path.basename(source))[0]}", [source])
        for source in sorted(glob("smallthinker_edge/_native/*.pyx"))
    ],
    language_level=3,
    compiler_directives={"embedsignature": True, "freethreading_compatible": False},
)
setup(
    ext_modules=[
        Extension(
            "smallthinker_edge._native._core",  # _native/__init__.py finds the modules in it
            [*(module.sources[0] for module in modules), *CORE, *kernel_sources()],
            include_dirs=["include"],
            depends=["setup.py", *glob("include/*/*.h"), *glob("src/**/*.h", recursive=True)],
            extra_compile_args=FLAGS,
            # ARM before version 7 has no atomic operations on 64 bits.
            extra_link_args=["-pthread", "-lm", *(["-latomic"] if "armv6" in TARGET else [])],
            define_macros=[("Py_LIMITED_API", "0x030B0000")] if ABI3 else [],
            py_limited_api=ABI3,
        )
    ],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if ABI3 else {},
)
