"""Commands to begin with: init, schema."""

import json
import re
import textwrap
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from cacp_ray.cli.app import app
from cacp_ray.errors import ArtifactError, ConfigError, nearest_names

KINDS = ("search", "finetune", "train", "tune-agent")


@app.command()
def init(
    recipe: Annotated[
        str | None, typer.Argument(help="Name of a recipe; without one, all are listed.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; default: RECIPE.yaml.")] = None,
) -> None:
    """List the recipes that come with the package, or write one as a YAML file to begin with."""
    recipes = list_recipes()
    if recipe is None:
        width = max(map(len, recipes))
        for name, text in recipes.items():
            about = textwrap.shorten(_first_sentence(text), 78 - width, placeholder="...")
            typer.echo(f"{name:{width}}  {about}")
        typer.echo("write one: cacp-ray init NAME")
        return
    name = Path(recipe).name.removesuffix(".yaml")
    if name not in recipes:
        raise ConfigError(f"unknown recipe {recipe!r}: {nearest_names(name, recipes)}")
    path = out or Path(f"{name}.yaml")
    if path.exists():
        raise ArtifactError(f"{path} exists: delete it, or choose another name with --out")
    path.write_text(recipes[name], encoding="utf-8")
    typer.echo(f"written: {path}")


@app.command()
def schema(
    kind: Annotated[str, typer.Argument(help=f"{', '.join(KINDS)}.")] = "search",
) -> None:
    """Print the JSON schema of a YAML file, with which editors complete and check it."""
    if kind not in KINDS:
        raise ConfigError(f"unknown kind of file {kind!r}: {nearest_names(kind, KINDS)}")
    typer.echo(json.dumps(_schema(kind), indent=2))


def list_recipes() -> dict[str, str]:
    """Texts of the YAML files that come with the package, by name."""
    inside = resources.files("cacp_ray") / "tune_configs"  # in a wheel
    folder: Any = inside if inside.is_dir() else Path(__file__).parents[2] / "tune_configs"
    files = [file for file in folder.iterdir() if file.name.endswith(".yaml")]
    files.sort(key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): file.read_text("utf-8") for file in files}


def _first_sentence(text: str) -> str:
    lines = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    return re.split(r"[.:;] ", " ".join(lines))[0].rstrip(".")


def _schema(kind: str) -> dict[str, Any]:
    from cacp_ray.config.agent_tuning import AgentTuningConfig
    from cacp_ray.config.finetune import FinetuneConfig
    from cacp_ray.config.run import RunConfig, TrainConfig

    kinds = (RunConfig, FinetuneConfig, TrainConfig, AgentTuningConfig)
    found = kinds[KINDS.index(kind)].model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}
