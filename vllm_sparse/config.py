"""SparseConfig: what a user may set under `additional_config["sparse"]`. No torch, no vLLM."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

SECTION = 'additional_config["sparse"]'

ALLOWED = {
    "coverage": "a number from 0 to 1: the share of attention mass that a head must cover",
    "break_even": "a whole number of tokens from 0 (0: prefill is never dense), or null to measure",
    "patterns": "the path of a pattern file, or null for the adaptive default in every head",
    "decode": '"dense", "exact", "lsh", "vattention" or "topk"',
    "softmax": '"online", "lazy" or "unified"',
    "linear": '"vllm", "flat" or "auto"',
    "dense_layers": "a list of layer numbers from 0, whose prefill is dense",
    "shared_prefix": "true or false: whether decode reads pages that several sequences begin with "
    "once for them, or null: on a CPU",
    "mean_correction": "true or false: whether blocks that are left out count by their means",
    "window": "a whole number of tokens from 16: what decode reads on the device, without `dense`",
    "sink": "a whole number of tokens from 0: the first of a sequence, kept on the device as well",
    "actors": "a whole number from 0 (0: vLLM's worker reads the host's rows itself), or "
    '"numa": one for each NUMA node',
    "ray": "true or false: whether actors are Ray actors instead of local processes",
    "rows": "a whole number from 16: the most rows that a KV head reads in the host, or null",
    "sampler_options": 'an object with options of the sampler, such as {"share": 0.05}',
    "resident_layers": "a list of layer numbers from 0, whose keys and values stay on the device",
    "host_gib": "a number above 0: GiB of host memory for keys and values, or null to choose",
    "host_dtype": '"auto" (the model\'s) or "int8": how host memory has keys and values',
}
SAMPLED = ("lsh", "vattention", "topk")


class SparseConfig(BaseModel):
    """Settings of the sparse backend; README.md has the table for users."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    coverage: float = Field(0.95, ge=0, le=1)
    break_even: int | None = Field(None, ge=0)
    patterns: str | None = None
    decode: Literal["dense", "exact", "lsh", "vattention", "topk"] = "dense"
    softmax: Literal["online", "lazy", "unified"] = "online"
    linear: Literal["vllm", "flat", "auto"] = "vllm"
    dense_layers: tuple[int, ...] = ()
    shared_prefix: bool | None = None
    mean_correction: bool = False
    # What follows is for decode other than "dense".
    window: int = Field(1024, ge=16)
    sink: int = Field(16, ge=0)
    actors: Annotated[int, Field(ge=0)] | Literal["numa"] = 0
    ray: bool = False
    # For decode that samples; the options of each sampler are those of cpu_offload/sampling.py.
    rows: int | None = Field(None, ge=16)
    sampler_options: tuple[tuple[str, float], ...] = ()  # by name; pairs, as it has to be hashable
    resident_layers: tuple[int, ...] = (0,)
    host_gib: float | None = Field(None, gt=0, allow_inf_nan=False)
    host_dtype: Literal["auto", "int8"] = "auto"

    @property
    def offloads(self) -> bool:
        """Whether keys and values of past tokens lie in host memory."""
        return self.decode != "dense"

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> SparseConfig:
        """The settings in vLLM's `additional_config`, which may hold none.

        Raises:
            ValueError: an unknown key or a bad value; says the key, the value, what is allowed.
        """
        given = additional_config.get("sparse") if isinstance(additional_config, Mapping) else None
        if given is None:
            return cls()
        if not isinstance(given, Mapping):
            raise ValueError(
                f"{SECTION} is {given!r}: allowed is an object with settings, "
                'such as {"coverage": 0.95}'
            )
        try:
            config = cls(**{str(key): value for key, value in given.items()})
        except ValidationError as error:
            raise ValueError("\n".join(_explain(given, error))) from None
        if conflicts := config._conflicts():
            raise ValueError("\n".join(conflicts))
        return config

    @property
    def samples(self) -> bool:
        """Whether decode reads some rows of host memory for all."""
        return self.decode in SAMPLED

    def _conflicts(self) -> list[str]:
        """Settings that say nothing beside the others."""
        found = []
        for key in ("rows", "sampler_options"):
            if getattr(self, key) and not self.samples:
                found.append(
                    f'{SECTION}["{key}"] is for decode that samples, and ["decode"] is '
                    f"{self.decode!r}: set it to one of {', '.join(SAMPLED)}, or leave {key} out"
                )
        if self.shared_prefix and self.offloads:
            found.append(
                f'{SECTION}["shared_prefix"] is for decode "dense", and ["decode"] is '
                f"{self.decode!r}: leave one of them out"
            )
        if self.ray and not self.actors:
            found.append(
                f'{SECTION}["ray"] makes the actors Ray actors, and ["actors"] is 0: set it to 1 '
                "or more, or leave ray out"
            )
        return found

    def check_layers(self, num_layers: int) -> None:
        """Raise ValueError if a setting names a layer that the model does not have."""
        for key in ("dense_layers", "resident_layers"):
            beyond = [i for i in getattr(self, key) if i >= num_layers]
            if beyond:
                raise ValueError(
                    f'{SECTION}["{key}"] names {beyond}: '
                    f"the model has the layers 0 to {num_layers - 1}"
                )

    @field_validator(
        "coverage", "break_even", "window", "sink", "actors", "rows", "host_gib", mode="before"
    )
    @classmethod
    def _no_truth_value(cls, value: Any) -> Any:
        if isinstance(value, bool):  # pydantic would read true as 1
            raise ValueError("a truth value")
        return value

    @field_validator("dense_layers", "resident_layers", mode="before")
    @classmethod
    def _layer_list(cls, value: Any) -> Any:
        # `--additional-config.sparse.dense_layers 3` arrives as 3, and `... 0,3` as the string.
        if isinstance(value, int) and not isinstance(value, bool):
            return (value,)
        if isinstance(value, (list, tuple)) and any(isinstance(x, bool) for x in value):
            raise ValueError("a truth value")
        if isinstance(value, str):
            return [part for part in value.strip("[] ").split(",") if part]
        return value

    @field_validator("sampler_options", mode="before")
    @classmethod
    def _numbers_by_name(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or any(isinstance(x, bool) for x in value.values()):
            raise ValueError("not an object with numbers")
        return tuple(sorted(value.items()))

    @field_validator("dense_layers", "resident_layers")
    @classmethod
    def _from_zero(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(i < 0 for i in value):
            raise ValueError("a negative layer")
        return tuple(sorted(set(value)))


def _explain(given: Mapping[str, Any], error: ValidationError) -> list[str]:
    lines = []
    for key in dict.fromkeys(str(e["loc"][0]) for e in error.errors()):
        if key not in ALLOWED:
            close = difflib.get_close_matches(key, ALLOWED, n=1)
            hint = f'did you mean "{close[0]}"? ' if close else ""
            lines.append(f"{SECTION} has the unknown key {key!r}: {hint}Keys: {', '.join(ALLOWED)}")
            continue
        lines.append(f'{SECTION}["{key}"] is {given[key]!r}: allowed is {ALLOWED[key]}')
    return lines
