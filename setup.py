"""The optional C++ libraries, one for each instruction set; everything else is in pyproject.toml."""

import os
import shlex
import sys
import sysconfig
from glob import glob
from shutil import which

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = "s4/backends/cpu"
# Setuptools takes CXX, or the compiler that Python was built with. Where that is missing, another one serves.
theirs = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")[0]
if "CXX" not in os.environ and not which(theirs) and (found := which("g++") or which("clang++")):
    os.environ["CC"] = os.environ["CXX"] = found
levels = {"base": []}
if sysconfig.get_platform().endswith(("x86_64", "amd64")):
    v3 = ["-mavx2", "-mfma"]
    v4 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"]
    levels |= {"v3": v3, "v4": [*v3, *v4]}
# Of .ci/sanitize.py: what g++ is to check at run time, such as address,undefined.
checks = os.environ.get("S4_SANITIZE")
sanitize = [f"-fsanitize={checks}", "-fno-sanitize-recover", "-O1", "-g"] if checks else ["-g0"]
# Only the functions that Python calls are seen, whatever of a C++ library is linked statically.
hidden = sys.platform == "linux" and not checks
exports = ["-s", f"-Wl,--version-script={FOLDER}/exports.map"] if hidden else []


class Libraries(build_ext):
    """Shared libraries, loaded through ctypes: nothing in them or their names is of a version of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def get_libraries(self, ext: Extension) -> list[str]:
        return ext.libraries

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols


class Wheel(bdist_wheel):
    """One wheel for every Python 3 of a platform, or of any platform where no library was built."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        return "py3", "none", platform if glob(f"{self.bdist_dir}/{FOLDER}/_native_*.so") else "any"


setup(
    ext_modules=[
        Extension(
            f"s4.backends.cpu._native_{level}",
            sources=[f"{FOLDER}/{level}.cpp"],
            depends=[*glob(f"{FOLDER}/*.h"), f"{FOLDER}/exports.map"],
            extra_compile_args=["-std=c++17", "-O3", "-ffp-contract=fast", "-pthread", *flags, *sanitize],
            extra_link_args=["-pthread", *exports, *sanitize],
            optional=True,  # no compiler, no library: the other backends remain
        )
        for level, flags in levels.items()
    ],
    cmdclass={"build_ext": Libraries, "bdist_wheel": Wheel},
    options={"build_ext": {"parallel": True}},
)
