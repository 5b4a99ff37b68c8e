"""Triton's interpreter without the work that it does over and over.

Of the interpreted tests' time, most went there (triton 3.9, shares by cProfile):

- each call of a function within a kernel replaces the language's functions by interpreted ones
  once more, though its kernel has done so: 35% of the decode kernels' tests;
- sums and products of integers are worked out once more in 64 bits, for an assertion that is not
  made without `debug`: 30% of what is left of them;
- the numpy type of each value is looked up in a table that is made for it: 13% of planning's;
- a scan of one dimension is two Python calls for each number: 34% of planning's. Here it takes
  doubling steps, whose order of sums is nearer to a GPU's.

What Triton no longer has by these names is left as it is, and slow.
"""

from __future__ import annotations

import dataclasses

import numpy as np

_installed = False


def install() -> None:
    """Once in a process; later calls do nothing."""
    global _installed
    if _installed:
        return
    from triton.runtime import interpreter

    _installed = True
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = PatchOnce(interpreter._patch_lang, interpreter._LangPatchScope)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = remembered_by_name(interpreter._get_np_dtype)
    options = getattr(getattr(interpreter, "interpreter_builder", None), "options", None)
    if hasattr(options, "sanitize_overflow") and not getattr(options, "debug", True):
        interpreter.interpreter_builder.options = dataclasses.replace(
            options, sanitize_overflow=False
        )
    if hasattr(getattr(interpreter, "ScanOps", None), "generic_scan"):
        interpreter.ScanOps.generic_scan = scan_by_doubling


class PatchOnce:
    """`_patch_lang`, which does nothing for functions whose language the running kernel's is."""

    def __init__(self, patch, scope_type) -> None:
        self._patch, self._scope_type = patch, scope_type
        self._modules_of: dict = {}  # functions, whose number is that of the kernels' sources
        self._done: set[str] = set()  # modules, while a kernel runs

    def __call__(self, function):
        seen = self._modules_of.get(function)
        if seen is None:
            seen = self._modules_of[function] = _languages(function)
        if seen and seen <= self._done:
            return self._scope_type()
        begins = not self._done  # a kernel's own scope is the first, and the one that is restored
        scope = self._patch(function)
        self._done |= seen
        if begins:
            restore = scope.restore

            def end() -> None:
                self._done.clear()
                restore()

            scope.restore = end
        return scope


def _languages(function) -> set[str]:
    """Which of the two modules that Triton looks for the function has, by any name."""
    from triton import language

    modules = (language, language.core)
    return {x.__name__ for x in function.__globals__.values() if any(x is m for m in modules)}


def remembered_by_name(get_np_dtype):
    """`_get_np_dtype`; all there is to ask of a type is what its scalars are called."""
    known: dict[str, np.dtype] = {}

    def get(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = get_np_dtype(dtype)
        return known[name]

    return get


def scan_by_doubling(self, inputs) -> list:
    """`ScanOps.generic_scan`: after step i each element is combined with the 2^i before it."""
    values = list(inputs)
    length = values[0].handle.data.shape[self.axis]
    shape = [1] * values[0].handle.data.ndim
    shape[self.axis] = length
    place = np.arange(length).reshape(shape)
    distance = 1
    while distance < length:
        before = [
            self.to_tensor(np.roll(x.handle.data, distance, self.axis), x.dtype) for x in values
        ]
        combined = self.combine_fn.fn(*before, *values)
        if not isinstance(combined, (tuple, list)):
            combined = [combined]
        values = [
            self.to_tensor(np.where(place >= distance, new.handle.data, old.handle.data), old.dtype)
            for new, old in zip(combined, values, strict=True)
        ]
        distance *= 2
    return values
