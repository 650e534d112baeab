"""The optional C++ extensions, one for each instruction set; everything else is in pyproject.toml."""

import os
import platform
import sysconfig
from glob import glob

from setuptools import Extension, setup

limited = not sysconfig.get_config_var("Py_GIL_DISABLED")  # free-threaded builds have no stable ABI to name
levels = {"base": []}
if platform.machine() in ("x86_64", "AMD64"):
    levels |= {"v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
# Of .ci/sanitize.py: what g++ is to check at run time, such as address,undefined.
checks = os.environ.get("S4_SANITIZE")
sanitize = [f"-fsanitize={checks}", "-fno-sanitize-recover", "-O1", "-g"] if checks else []
setup(
    ext_modules=[
        Extension(
            f"s4.backends.cpu._native_{level}",  # a plain shared library, loaded there through ctypes
            sources=[f"s4/backends/cpu/{level}.cpp"],
            depends=glob("s4/backends/cpu/*.h"),
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-pthread", *flags, *sanitize],
            extra_link_args=["-pthread", *sanitize],
            py_limited_api=limited,
            optional=True,  # no compiler, no extension: the other backends remain
        )
        for level, flags in levels.items()
    ],
    options={"build_ext": {"parallel": True}}
    | ({"bdist_wheel": {"py_limited_api": "cp310"}} if limited else {}),
)
