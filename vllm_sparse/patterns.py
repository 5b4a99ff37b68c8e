"""Per-head attention patterns, and the JSON file that keeps those of a model.

A pattern file is data from elsewhere: its size and shape are bounded, nothing in it is executed,
and what is shown of it is quoted and shortened.
"""

from __future__ import annotations

import json
import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import UserError
from .files import write_whole

SCHEMA_VERSION = 1
MAX_FILE_BYTES = 64 << 20  # 4,096 layers x 128 heads at 128 bytes each
MAX_LAYERS = 4096
MAX_HEADS = 4096
MAX_TOKENS = 1 << 31  # positions are int32
MAX_EXTRA = 64  # entries of `settings`, `tools` and `rope`
MAX_SHOWN = 80  # characters of a file's text in a message

Tokens = Annotated[int, Field(ge=0, lt=MAX_TOKENS, strict=True)]
Count = Annotated[int, Field(ge=1, lt=MAX_TOKENS, strict=True)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Phi = Annotated[list[Annotated[float, Field(ge=-1e6, le=1e6)]], Field(max_length=MAX_HEADS)]
Text = Annotated[str, Field(max_length=512)]
Scalar = bool | int | float | Text | None
Values = Scalar | Annotated[list[Scalar], Field(max_length=MAX_HEADS)]
Extra = Annotated[dict[Text, Values], Field(max_length=MAX_EXTRA)]

Table = Annotated[list[list[float | None]], Field(max_length=MAX_LAYERS)]

Kind = Literal["adaptive", "dense", "a_shape", "vertical_slash", "block_sparse"]

# The fields that give a kind its fixed budget, all or none; `coverage` stands in their place.
BUDGET: dict[str, tuple[str, ...]] = {
    "adaptive": (),
    "dense": (),
    "a_shape": ("sink", "window"),
    "vertical_slash": ("vertical", "slash"),
    "block_sparse": ("blocks",),
}


class PatternError(UserError, ValueError):
    """A pattern or pattern file that cannot be used; the message says why and what is allowed."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class HeadPattern(_Strict):
    """What one query head reads in prefill.

    adaptive        the cheapest of the other kinds that covers `coverage` of the mass (default)
    dense           every causal key
    a_shape         the first `sink` tokens and the last `window` tokens
    vertical_slash  the `vertical` heaviest columns and `slash` heaviest diagonals
    block_sparse    the `blocks` best blocks of each query tile

    With `coverage` in place of the numbers, a kind takes what covers that share of the mass, and
    is dense in a chunk where it cannot.
    """

    kind: Kind = "adaptive"
    sink: Tokens | None = None
    window: Count | None = None
    vertical: Tokens | None = None
    slash: Tokens | None = None
    blocks: Count | None = None
    coverage: Share | None = None

    @model_validator(mode="after")
    def _budget(self) -> HeadPattern:
        wanted = BUDGET[self.kind]
        given = [name for names in BUDGET.values() for name in names if self._has(name)]
        if foreign := [name for name in given if name not in wanted]:
            allowed = (*wanted, "coverage") if self.kind != "dense" else ()
            raise ValueError(
                f"{foreign[0]} = {getattr(self, foreign[0])} does not belong to kind "
                f"{self.kind!r}; allowed: {', '.join(allowed) or 'nothing'}"
            )
        if self.kind == "dense" and self.coverage is not None:
            raise ValueError("coverage does not belong to kind 'dense'; allowed: nothing")
        missing = [name for name in wanted if not self._has(name)]
        if wanted and self.coverage is None and missing:
            raise ValueError(f"{missing[0]} is missing; give {' and '.join(wanted)}, or coverage")
        if given and self.coverage is not None:
            raise ValueError(
                f"coverage = {self.coverage} and {given[0]} = {getattr(self, given[0])} exclude "
                f"each other; give {' and '.join(wanted)}, or coverage"
            )
        return self

    def _has(self, name: str) -> bool:
        return getattr(self, name) is not None

    @property
    def fixed(self) -> bool:
        """Whether counts, and not the covered mass, decide what is read."""
        return bool(BUDGET[self.kind]) and self.coverage is None


ADAPTIVE = HeadPattern()


class ModelInfo(_Strict):
    """The model that a file's patterns belong to. `rope` holds its rotary settings by name.

    KV heads and head size are None where an imported file does not tell them.
    """

    name: Text
    layers: Annotated[int, Field(ge=1, le=MAX_LAYERS, strict=True)]
    heads: Annotated[int, Field(ge=1, le=MAX_HEADS, strict=True)]
    kv_heads: Annotated[int, Field(ge=1, le=MAX_HEADS, strict=True)] | None = None
    head_size: Annotated[int, Field(ge=1, le=4096, strict=True)] | None = None
    rope: Extra = {}

    @model_validator(mode="after")
    def _groups(self) -> ModelInfo:
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads = {self.kv_heads} does not divide heads = {self.heads}; "
                "allowed: a divisor"
            )
        return self


def read_json(path: str | os.PathLike[str], where: str, *, levels: int, **hooks: Any) -> Any:
    """What a JSON file of bounded size holds; `hooks` are those of `json.loads`.

    Raises:
        PatternError: begins with `where` and says what is wrong; `levels` is how deep it may nest.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise PatternError(f"{where} cannot be read: {error.strerror or error}") from error
    if len(text) > MAX_FILE_BYTES:
        raise PatternError(f"{where} is over {MAX_FILE_BYTES >> 20} MiB, the most allowed")
    try:
        return json.loads(text, **hooks)
    except RecursionError:
        raise PatternError(f"{where} is nested too deeply; it needs {levels} levels") from None
    except ValueError as error:  # a JSONDecodeError or UnicodeDecodeError too
        raise PatternError(f"{where} is not valid JSON: {error}") from error


class PatternFile(_Strict):
    """The patterns of a model's heads, by layer and by head; a head without one is adaptive.

    `settings` says how the patterns were found, `tools` with which versions of what, and
    `measured` what a search measured of each head's pattern: tables by name, [layer][head]. `phi`
    holds, by layer, the constant maximum of each query head for decode with softmax "unified".
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    model: ModelInfo
    settings: Extra = {}
    tools: Extra = {}
    measured: Annotated[dict[Text, Table], Field(max_length=MAX_EXTRA)] = {}
    layers: dict[int, dict[int, HeadPattern]] = {}
    phi: dict[int, Phi] = {}

    @field_validator("layers", "phi", mode="before")
    @classmethod
    def _canonical(cls, layers: Any) -> Any:
        """'07' and '7' would both be layer 7, and one would silently win."""
        for name, keys in [("layer", layers), *(("head", v) for v in _values(layers))]:
            for key in keys if isinstance(keys, dict) else ():
                if isinstance(key, str) and not (key.isascii() and key == str(_int(key))):
                    raise ValueError(f"{name} {shown(key)} is not a number like '7'")
        return layers

    @model_validator(mode="after")
    def _within_model(self) -> PatternFile:
        for layer, heads in self.layers.items():
            if not 0 <= layer < self.model.layers:
                raise ValueError(f"layer {layer} does not exist; allowed: {_to(self.model.layers)}")
            for head in heads:
                if not 0 <= head < self.model.heads:
                    raise ValueError(
                        f"head {head} of layer {layer} does not exist; "
                        f"allowed: {_to(self.model.heads)}"
                    )
        shape = f"{self.model.layers} layers of {self.model.heads} heads"
        for name, table in self.measured.items():
            if len(table) != self.model.layers or any(len(r) != self.model.heads for r in table):
                raise ValueError(f"measured.{shown(name)[1:-1]} is not a table of {shape}")
        return self

    @model_validator(mode="after")
    def _phi_of_every_head(self) -> PatternFile:
        for layer, values in self.phi.items():
            if not 0 <= layer < self.model.layers:
                raise ValueError(
                    f"phi of layer {layer}, which does not exist; allowed: {_to(self.model.layers)}"
                )
            if len(values) != self.model.heads:
                raise ValueError(
                    f"phi of layer {layer} has {len(values)} entries; allowed: one for each of the "
                    f"{self.model.heads} heads"
                )
        return self

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PatternFile:
        """Read and validate a file; PatternError names the file, the field and what is allowed."""
        where = f"pattern file {whole(path)}"
        strict = {"object_pairs_hook": _unique, "parse_constant": _no_constant}
        return cls.parse(read_json(path, where, levels=4, **strict), where)

    @classmethod
    def parse(cls, data: Any, where: str = "pattern file") -> PatternFile:
        """Validate parsed JSON; `where` begins the message of an error."""
        version = data.get("schema_version") if isinstance(data, dict) else None
        if isinstance(data, dict) and version != SCHEMA_VERSION:
            raise PatternError(
                f"{where}: schema_version: got {shown(version)}; this vllm-sparse reads "
                f"{SCHEMA_VERSION}"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise PatternError(f"{where}: {_explain(error)}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        text = json.dumps(self.model_dump(mode="json", exclude_none=True), indent=1) + "\n"
        write_whole(path, text)

    def for_layer(
        self, layer: int, head_start: int = 0, head_count: int | None = None
    ) -> tuple[HeadPattern, ...]:
        """The patterns of `head_count` query heads of a layer, from `head_start` on.

        A tensor-parallel rank passes its own range of the model's heads.
        """
        count = self.model.heads - head_start if head_count is None else head_count
        if not 0 <= layer < self.model.layers:
            raise PatternError(f"layer: got {layer}; allowed: {_to(self.model.layers)}")
        if head_start < 0 or count < 0 or head_start + count > self.model.heads:
            raise PatternError(
                f"heads: got {head_start} to {head_start + count}; the file has {self.model.heads}"
            )
        heads = self.layers.get(layer, {})
        return tuple(heads.get(i, ADAPTIVE) for i in range(head_start, head_start + count))

    def check_model(
        self,
        *,
        layers: int,
        heads: int,
        kv_heads: int,
        head_size: int,
        name: str | None = None,
        rope: dict[str, Any] | None = None,
    ) -> None:
        """Raise PatternError with every difference to the model at hand.

        `name` and `rope` are compared where given; of `rope` the entries that both sides have.
        """
        pairs: list[tuple[str, Any, Any]] = [
            ("layers", self.model.layers, layers),
            ("heads", self.model.heads, heads),
            ("kv_heads", self.model.kv_heads, kv_heads),
            ("head_size", self.model.head_size, head_size),
        ]
        pairs = [pair for pair in pairs if pair[1] is not None]  # not known
        if name is not None:
            pairs.insert(0, ("name", self.model.name, name))
        for key, value in (rope or {}).items():
            if key in self.model.rope:
                pairs.append((f"rope.{key}", self.model.rope[key], value))
        different = [
            f"{field}: file {shown(ours)}, model {shown(theirs)}"
            for field, ours, theirs in pairs
            if ours != theirs
        ]
        if different:
            raise PatternError(
                f"the pattern file is of another model, {shown(self.model.name)}: "
                + "; ".join(different)
            )


def shown(value: Any) -> str:
    """A value of unknown origin, for a message: quoted, ASCII, shortened."""
    if isinstance(value, str | bytes):
        value = value[: MAX_SHOWN + 1]
    elif isinstance(value, dict | list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    text = ascii(value) if not isinstance(value, int) or abs(value) < 1 << 63 else "a huge number"
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def whole(path: str | os.PathLike[str]) -> str:
    """A path or name that the user gave, for a message: quoted, ASCII, however long it is."""
    return ascii(os.fspath(path))


def _explain(error: ValidationError) -> str:
    """The first three problems of a validation, each with field, value and what is allowed."""
    lines = []
    for problem in error.errors(include_url=False)[:3]:
        field = ".".join(shown(str(part))[1:-1] for part in problem["loc"]) or "the file"
        message = problem["msg"].removeprefix("Value error, ")
        value = "" if problem["type"] == "value_error" else f"got {shown(problem['input'])}; "
        if problem["type"] == "missing":
            value = ""
        lines.append(f"{field}: {value}{message}")
    more = error.error_count() - len(lines)
    return "; ".join(lines) + (f"; and {more} more" if more else "")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} stands twice in one object")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _values(mapping: Any) -> list[Any]:
    return list(mapping.values()) if isinstance(mapping, dict) else []


def _int(text: str) -> int | None:
    return int(text) if text.isdigit() and len(text) < 10 else None


def _to(count: int) -> str:
    return f"0 to {count - 1}"
