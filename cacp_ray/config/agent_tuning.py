"""The configuration of `tune-agent`: a search, and the settings of its agent to try."""

import json
import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, field_validator, model_validator

from cacp_ray.config.reading import load_config, resolved
from cacp_ray.config.run import RunConfig, Section, is_section
from cacp_ray.errors import ConfigError
from cacp_ray.searching.strategies import AGENTS

SECTIONS = ("agent", "paper")  # sections of the configuration that hold an agent's settings
# Settings that shape an agent's weights and memory, which another trial's would not fit.
FIXED = ("hidden", "action_scale", "warmup")


class Distribution(Section):
    """Values of a setting to draw from: exactly one of the three is given."""

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
            return as_text(value) in map(as_text, self.choice)
        low, high = self.uniform or self.log_uniform or (0.0, 0.0)
        return isinstance(value, int | float) and low <= value <= high

    def samples(self) -> tuple[Any, ...]:
        """All choices, or both ends and a fractional value between them."""
        if self.choice is not None:
            return self.choice
        low, high = self.uniform or self.log_uniform or (0.0, 0.0)
        return low, low + (high - low) / math.pi, high


class AgentTuningConfig(Section):
    """Searches that differ from `search` in settings of the agent alone."""

    name: str = "tune-agent"
    search: RunConfig = Field(description="the content of a search's YAML")
    space: dict[str, Distribution] = Field(
        min_length=1, description="values by key path, such as agent.lr"
    )
    trials: int = Field(
        default=24, ge=2, description="number of trials; the first has the settings of `search`"
    )
    evaluations: int = Field(default=100, ge=1, description="evaluations of each search of a trial")
    seeds: tuple[NonNegativeInt, ...] = Field(
        default=(0, 1), min_length=1, description="each trial searches once a seed"
    )
    objective: Literal["score", "area"] = Field(
        default="score",
        description="score: the best after all evaluations, a mean over rates and seeds; area: its "
        "mean over the evaluations",
    )
    algorithm: Literal["random", "optuna"] = Field(
        default="random", description="how settings are drawn; optuna: by its TPE"
    )
    scheduler: Literal["asha", "pbt", "none"] = Field(
        default="asha",
        description="asha stops poor trials; pbt has them go on from better ones with changed "
        "settings; none leaves them alone",
    )
    seed: NonNegativeInt = Field(default=0, description="seed of the settings drawn first")

    @field_validator("space", mode="before")
    @classmethod
    def _flatten(cls, space: Any) -> Any:
        """`agent: {lr: ...}`, which `--set space.agent.lr=...` makes, means `agent.lr: ...`."""
        if not is_section(space):
            return space
        nested = {key: value for key, value in space.items() if key in SECTIONS}
        flat = {key: value for key, value in space.items() if key not in SECTIONS}
        for section, settings in nested.items():
            if not is_section(settings):
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
        ValueError: A key is unknown.
    """
    values = resolved(search)
    settings: dict[str, Any] = {}
    for key in keys:
        section, _, name = key.partition(".")
        if name not in values[section]:
            raise ValueError(f"space.{key}: unknown; settings are {', '.join(values[section])}")
        settings[key] = values[section][name]
    return settings


def with_settings(search: RunConfig, settings: Mapping[str, Any], **changes: Any) -> RunConfig:
    """The configuration with other settings of its agent.

    Raises:
        ConfigError: The configuration does not allow a value.
    """
    texts = [f"{key}={value}" for key, value in settings.items()]
    return load_config(RunConfig, resolved(search) | changes, texts)
