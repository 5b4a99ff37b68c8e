"""Build the native extension with the address and undefined-behaviour sanitizers, and test that.

python tools/sanitize.py [pytest arguments]        default: the tests of all native kernels
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitized"
# The first undefined behaviour ends the program, as a bad access does.
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
TESTS = ["tests/offload", "tests/kernels"]


def build() -> Path:
    shutil.rmtree(BUILD, ignore_errors=True)
    environment = {**os.environ, "CFLAGS": FLAGS, "LDFLAGS": FLAGS}
    where = [f"--build-lib={BUILD}", f"--build-temp={BUILD / 'objects'}"]
    command = [sys.executable, "setup.py", "--quiet", "build_ext", *where]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    libraries = list(BUILD.rglob("_cpu*.so"))
    if not libraries:
        raise SystemExit("The extension was not built: see the compiler's messages above.")
    return libraries[0]


def runtime(name: str) -> str:
    """A library of the compiler that built the extension."""
    compiler = os.environ.get("CC", "cc").split()[0]
    found = subprocess.run(
        [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        raise SystemExit(f"{compiler} has no {name}: install its sanitizers, or set CC to gcc.")
    return found


def main() -> int:
    library = build()
    environment = {
        **os.environ,
        # torch throws exceptions, which the sanitizer passes on only to a libstdc++ that is there
        # when it starts.
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}",
        # Python and torch keep memory until the process ends.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    pytest = Path(sys.executable).with_name("pytest")
    given = sys.argv[1:]
    named = any(Path(argument.split("::")[0]).exists() for argument in given)
    command = [pytest, f"--native-library={library}", *given, *([] if named else TESTS)]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
