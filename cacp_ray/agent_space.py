"""The configuration of `tune-agent`: a search, and which settings of its agent are tried."""

import json
import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, field_validator, model_validator

from cacp_ray.config import RunConfig, Section, load_config, resolved
from cacp_ray.errors import ConfigError
from cacp_ray.searching.strategies import AGENTS

SECTIONS = ("agent", "paper")  # of the configuration, that hold an agent's settings
# What an agent is made with: another's weights and memory would not fit.
FIXED = ("hidden", "action_scale", "warmup")


class Distribution(Section):
    """Values of a setting: one of the three."""

    choice: tuple[Any, ...] | None = Field(default=None, min_length=2)
    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> "Distribution":
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give one of choice, uniform and log_uniform")
        if self.choice is None:
            low, high = getattr(self, given[0])
            if not low < high or (given[0] == "log_uniform" and low <= 0):
                raise ValueError(f"{given[0]}: [low, high], low first and above 0 for log_uniform")
        return self

    def holds(self, value: Any) -> bool:
        """Whether a resolved value can be drawn."""
        if self.choice is not None:
            return as_text(value) in [as_text(each) for each in self.choice]
        low, high = self.uniform or self.log_uniform or (0.0, 0.0)
        return isinstance(value, int | float) and low <= value <= high

    def samples(self) -> tuple[Any, ...]:
        """All choices, or both ends and a value between that is no whole number."""
        if self.choice is not None:
            return self.choice
        low, high = self.uniform or self.log_uniform or (0.0, 0.0)
        return low, low + (high - low) / math.pi, high


class AgentTuningConfig(Section):
    """Searches with different settings of the agent, all else as in `search`."""

    name: str = "tune-agent"
    search: RunConfig = Field(description="as in the YAML of a search")
    space: dict[str, Distribution] = Field(min_length=1, description="by key path: agent.lr")
    trials: int = Field(default=24, ge=2, description="the first has the settings of `search`")
    evaluations: int = Field(default=100, ge=1, description="of each search of a trial")
    seeds: tuple[NonNegativeInt, ...] = Field(
        default=(0, 1), min_length=1, description="a search each"
    )
    objective: Literal["top1", "area"] = Field(
        default="top1",
        description="mean over rates and seeds of the best accuracy after all evaluations, or its "
        "mean over the evaluations",
    )
    algorithm: Literal["random", "optuna"] = "random"
    scheduler: Literal["asha", "pbt", "none"] = "asha"
    seed: NonNegativeInt = Field(default=0, description="of the settings drawn first")

    @field_validator("space", mode="before")
    @classmethod
    def _flatten(cls, space: Any) -> Any:
        """`agent: {lr: ...}`, which `--set space.agent.lr=...` makes, means `agent.lr: ...`."""
        if not isinstance(space, dict):
            return space
        nested = {key: value for key, value in space.items() if key in SECTIONS}
        flat = {key: value for key, value in space.items() if key not in SECTIONS}
        for section, settings in nested.items():
            if not isinstance(settings, dict):
                raise ValueError(f"{section}: give its settings by name, as agent.lr")
            flat |= {f"{section}.{name}": value for name, value in settings.items()}
        return flat

    @field_validator("space")
    @classmethod
    def _known(cls, space: dict[str, Distribution]) -> dict[str, Distribution]:
        for key in space:
            if key.partition(".")[0] not in SECTIONS or key.count(".") != 1:
                raise ValueError(f"{key} is no setting of an agent: agent.NAME or paper.NAME")
        return space

    @model_validator(mode="after")
    def _fits(self) -> "AgentTuningConfig":
        if self.search.strategy not in AGENTS:
            raise ValueError(f"search.strategy {self.search.strategy} has no agent: {AGENTS}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} name one twice: give different ones")
        if (self.scheduler, self.algorithm) == ("pbt", "optuna"):
            raise ValueError("pbt changes settings itself: leave algorithm optuna out")
        section = SECTIONS[self.search.strategy != "cacp"]
        start = read_settings(self.search, self.space)
        for key, distribution in self.space.items():
            if self.scheduler == "pbt" and key.partition(".")[2] in FIXED:
                raise ValueError(f"space.{key} cannot change while an agent learns: leave pbt")
            if not distribution.holds(start[key]):
                raise ValueError(
                    f"space.{key} leaves out the value of `search`, {start[key]}: widen it, so "
                    "that the tuned settings can be compared with those"
                )
            if not key.startswith(f"{section}."):
                raise ValueError(
                    f"space.{key} changes nothing in strategy {self.search.strategy}: name "
                    f"settings of {section}"
                )
            for value in distribution.samples():
                try:
                    with_settings(self.search, {key: as_text(value)})
                except ConfigError as error:
                    reason = str(error).removeprefix("configuration: ")
                    raise ValueError(f"space.{key} allows {value}: {reason}") from error
        return self


def as_text(value: Any) -> Any:
    """A value as Ray Tune can keep it: lists as YAML text."""
    return json.dumps(value) if isinstance(value, list | tuple) else value


def read_settings(search: RunConfig, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a configuration by key path.

    Raises:
        ValueError: It has no such key.
    """
    values = resolved(search)
    found = {}
    for key in keys:
        section, _, name = key.partition(".")
        if name not in values[section]:
            raise ValueError(f"space.{key}: unknown; settings are {', '.join(values[section])}")
        found[key] = values[section][name]
    return found


def with_settings(search: RunConfig, settings: Mapping[str, Any], **changes: Any) -> RunConfig:
    """The configuration with other settings of its agent.

    Raises:
        ConfigError: A value that the configuration does not allow.
    """
    texts = [f"{key}={value}" for key, value in settings.items()]
    return load_config(RunConfig, resolved(search) | changes, texts)
