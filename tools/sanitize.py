"""Build the native extension with sanitizers, and test that.

python tools/sanitize.py [--threads] [pytest arguments]    default: the tests of all native kernels

Of addresses and of undefined behaviour, or with --threads of threads: data races.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Sanitizer:
    """A build of the extension, and how what it finds ends the tests."""

    flags: str
    runtime: str
    calls: bytes  # a function that code compiled for it calls
    options: dict[str, str]
    tests: tuple[str, ...]
    folder: str
    arguments: tuple[str, ...] = ()  # of pytest

    @property
    def build(self) -> Path:
        return ROOT / "build" / self.folder


ADDRESSES = Sanitizer(
    # The first undefined behaviour ends the program, as a bad access does.
    "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1",
    "libasan.so",
    b"__asan_report_load",
    {
        # Python and torch keep memory until the process ends.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
    ("tests/offload", "tests/kernels"),
    "sanitized",
)
# A race does not end the program: torch's OpenMP, which is not built for it, would at once.
# tests/offload starts processes, whose reports would be theirs.
THREADS = Sanitizer(
    "-fsanitize=thread -fno-omit-frame-pointer -g1",
    "libtsan.so",
    b"__tsan_read",
    {"TSAN_OPTIONS": "exitcode=0 report_thread_leaks=0 history_size=4"},
    ("tests/kernels",),
    "sanitized-threads",
    ("--native-threads=3",),
)


def build(sanitizer: Sanitizer) -> Path:
    shutil.rmtree(sanitizer.build, ignore_errors=True)
    # For C++ setuptools reads CXXFLAGS, and older ones CFLAGS.
    names = ("CFLAGS", "CXXFLAGS", "LDFLAGS")
    environment = {**os.environ, **dict.fromkeys(names, sanitizer.flags)}
    where = [f"--build-lib={sanitizer.build}", f"--build-temp={sanitizer.build / 'objects'}"]
    command = [sys.executable, "setup.py", "--quiet", "build_ext", *where]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    libraries = list(sanitizer.build.rglob("_cpu*.so"))
    if not libraries:
        raise SystemExit("The extension was not built: see the compiler's messages above.")
    if sanitizer.calls not in libraries[0].read_bytes():
        raise SystemExit(
            f"{libraries[0]} calls no {sanitizer.calls.decode()}: it was compiled without "
            f"{sanitizer.flags}, and would pass whatever it does."
        )
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


def ours(reports: str) -> list[str]:
    """Of the thread sanitizer's reports those that our library has a part in.

    The C library frees what an ended thread had for itself in the thread that takes its place.
    """
    return [
        part.strip()
        for part in reports.split("==================")
        if "WARNING" in part and "_cpu.abi3.so" in part and "_dl_deallocate_tls" not in part
    ]


def main() -> int:
    given = sys.argv[1:]
    sanitizer = THREADS if "--threads" in given else ADDRESSES
    given = [argument for argument in given if argument != "--threads"]
    library = build(sanitizer)
    named = any(Path(argument.split("::")[0]).exists() for argument in given)
    pytest = Path(sys.executable).with_name("pytest")
    tests = [] if named else sanitizer.tests
    with tempfile.TemporaryDirectory() as folder:
        # Into files: pytest keeps what tests print, and a program that is ended does not show it.
        options = {
            name: f"{value} log_path={folder}/report" for name, value in sanitizer.options.items()
        }
        # torch throws exceptions, which the sanitizer passes on only to a libstdc++ that is there
        # when it starts.
        preload = f"{runtime(sanitizer.runtime)} {runtime('libstdc++.so.6')}"
        status = subprocess.run(
            [pytest, *sanitizer.arguments, *given, *tests],
            cwd=ROOT,
            env={
                **os.environ,
                **options,
                "LD_PRELOAD": preload,
                "TEST_NATIVE_LIBRARY": str(library),
            },
        ).returncode
        reports = "".join(file.read_text() for file in Path(folder).iterdir())
    found = ours(reports) if sanitizer is THREADS else [reports] if reports else []
    for report in found:
        print(report, file=sys.stderr)
    if sanitizer is THREADS:
        print(f"{len(found)} data races in the native kernels")
    return status or int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
