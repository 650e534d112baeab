"""The optional C++ extension; everything else is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "s4.kernel._cpu_native",  # a plain shared library, loaded by s4/kernel/_cpu.py through ctypes
            sources=["s4/kernel/_cpu.cpp"],
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-pthread"],
            extra_link_args=["-pthread"],
            py_limited_api=True,
            optional=True,  # no compiler, no extension: the other backends remain
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
