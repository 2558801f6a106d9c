"""Builds the extension ``hostupdate._core`` from the C core; setup.py names it.

HOSTUPDATE_DEVELOPER=1 turns warnings into errors, HOSTUPDATE_SANITIZE=1 builds with the address and
undefined-behaviour sanitizers, HOSTUPDATE_FAULTS=1 with the fault points of fault.h. Run it
through setuptools only: by hand it would leave a library in the package whose name outranks the
built one.
"""

import os
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent
SOURCES = ("freezer", "keeper", "clock", "ram", "digest", "address_space")

FLAGS = [
    "-std=gnu11",
    "-D_GNU_SOURCE",
    "-O2",
    "-g",
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
    "-fstack-protector-strong",
    "-UNDEBUG",  # setuptools passes -DNDEBUG; assertions stay
    # A wrong prototype in core.cdef must stop the build; GCC before 14 only warns of these.
    "-Werror=implicit-function-declaration",
    "-Werror=incompatible-pointer-types",
    "-Werror=int-conversion",
    "-Werror=return-type",
]
DEVELOPER_FLAGS = [
    "-Werror",
    "-Wshadow",
    "-Wstrict-prototypes",
    "-Wconversion",
    "-Wvla",
    "-Wundef",
    "-Wformat=2",
]
FORTIFY_FLAGS = ["-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2"]
SANITIZE_FLAGS = ["-U_FORTIFY_SOURCE", "-fsanitize=address,undefined", "-fno-omit-frame-pointer"]

developer = os.environ.get("HOSTUPDATE_DEVELOPER") == "1"
faults = os.environ.get("HOSTUPDATE_FAULTS") == "1"
sanitize = os.environ.get("HOSTUPDATE_SANITIZE") == "1"

ffibuilder = FFI()
ffibuilder.cdef((HERE / "core.cdef").read_text())
ffibuilder.set_source(
    "hostupdate._core",
    '#include "hostupdate.h"',
    # Relative to setup.py, as setuptools wants them.
    sources=[f"csrc/{name}.c" for name in SOURCES if (HERE / f"{name}.c").exists()],
    depends=[
        "csrc/hostupdate.h",
        "csrc/internal.h",
        "csrc/fault.h",
        "csrc/ram.h",
        "csrc/core.cdef",
    ],
    include_dirs=["csrc"],
    extra_compile_args=[
        *FLAGS,
        *(SANITIZE_FLAGS if sanitize else FORTIFY_FLAGS),
        *(DEVELOPER_FLAGS if developer else []),
        *(["-DHU_FAULTS"] if faults else []),
    ],
    extra_link_args=["-fsanitize=address,undefined"] if sanitize else [],
)
