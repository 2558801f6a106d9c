"""Everything but the C extension is in pyproject.toml."""

from setuptools import setup

setup(
    cffi_modules=["csrc/ffi_build.py:ffibuilder"],
    # The extension keeps to the stable ABI: one wheel serves Python 3.11 and later.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
