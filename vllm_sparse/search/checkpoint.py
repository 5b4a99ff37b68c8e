"""What an interrupted search keeps: the scores of each layer and prompt that it was done with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vllm_sparse.errors import UserError
from vllm_sparse.files import write_whole
from vllm_sparse.patterns import shown, whole

from .cost import Costs
from .evaluate import Scores

FIELDS = ("whole", "worst", "last", "norm", "blocks", "columns")


class ResumeError(UserError, ValueError):
    """A checkpoint that is of another search; the message says how they differ."""


class Checkpoint:
    """A folder beside the result: `settings.json`, and a file for each layer of each prompt."""

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool) -> None:
        """Begin, or with `resume` go on with what the folder holds.

        Raises:
            ResumeError: the folder is of a search with other settings.
        """
        self.folder = folder
        known = folder / "settings.json"
        if resume and known.exists():
            try:
                before = json.loads(known.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                before = None
            if not isinstance(before, dict):
                raise ResumeError(
                    f"{whole(known)} is no checkpoint of a search; start anew without --resume"
                )
            names = sorted(before.keys() | settings.keys())
            if other := [n for n in names if before.get(n) != settings.get(n)]:
                said = "; ".join(
                    f"{n}: then {shown(before.get(n))}, now {shown(settings.get(n))}" for n in other
                )
                raise ResumeError(
                    f"the interrupted search had other settings: {said}. Give the same again, or "
                    "start anew without --resume"
                )
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_whole(known, json.dumps(settings, indent=1) + "\n")

    def costs(self, measure: Callable[[], Costs]) -> Costs:
        """The costs that this search began with; `measure` gives them where it just begins."""
        path = self.folder / "costs.json"
        if path.exists():
            return Costs.model_validate_json(path.read_text(encoding="utf-8"))
        costs = measure()
        write_whole(path, costs.model_dump_json() + "\n")
        return costs

    def load(self, prompt: int, layer: int) -> Scores | int | None:
        """The scores of a layer, if it was done with; an int is the window of one that is not
        searched."""
        path = self._path(prompt, layer)
        if not path.exists():
            return None
        data = json.loads(path.read_text(encoding="utf-8"))
        if "window" in data:
            return int(data["window"])
        return Scores(*(np.array(data[name], dtype=np.float64) for name in FIELDS))

    def save(self, prompt: int, layer: int, found: Scores | int) -> None:
        # Python writes floats so that they are read back as they were.
        if isinstance(found, int):
            data: dict[str, Any] = {"window": found}
        else:
            data = {name: getattr(found, name).tolist() for name in FIELDS}
        write_whole(self._path(prompt, layer), json.dumps(data) + "\n")

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, prompt: int, layer: int) -> Path:
        return self.folder / f"prompt-{prompt:03d}-layer-{layer:04d}.json"
