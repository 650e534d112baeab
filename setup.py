"""The optional C++ extension; everything else is in pyproject.toml."""

import sysconfig
from glob import glob

from setuptools import Extension, setup

limited = not sysconfig.get_config_var("Py_GIL_DISABLED")  # free-threaded builds have no stable ABI to name
setup(
    ext_modules=[
        Extension(
            "s4.kernel._cpu_native",  # a plain shared library, loaded by s4/kernel/_cpu.py through ctypes
            sources=["s4/kernel/_cpu.cpp"],
            depends=glob("s4/kernel/_cpu_*.h"),
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-pthread"],
            extra_link_args=["-pthread"],
            py_limited_api=limited,
            optional=True,  # no compiler, no extension: the other backends remain
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if limited else {},
)
