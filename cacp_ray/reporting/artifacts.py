"""The final table and the subnets of a run as artifacts at Weights & Biases and MLflow."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cacp_ray.reporting.summary import size_columns, summary_rows

NAME = "networks"


def log_networks(loggers: Sequence[str], project: str, run_dir: Path, result: Any) -> None:
    """Logs a table of all rates, and the subnet folders, once they are fine-tuned.

    Args:
        loggers: Names of loggers, of which `wandb` and `mlflow` take artifacts.
        project: Project in W&B, experiment in MLflow.
        run_dir: Folder of the run.
        result: Content of its result.json.
    """
    for name in loggers:
        if name in LOG:
            LOG[name](project, run_dir, result)


def list_networks(result: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Heads and rows of the table: the label of a network, its costs and its scores."""
    label = size_columns(result)[0]
    keys = ["cost_kept", "macs", "params", "score", "finetuned_score", "test_score"]
    rows = [[label.text(row), *(row.get(key) for key in keys)] for row in summary_rows(result)]
    return ["rate", *keys], rows


def _log_to_wandb(project: str, run_dir: Path, result: dict[str, Any]) -> None:
    import wandb  # pyright: ignore[reportMissingImports]

    heads, rows = list_networks(result)
    run = wandb.init(project=project, name=NAME, dir=str(run_dir))
    run.log({NAME: wandb.Table(columns=heads, data=rows)})
    artifact = wandb.Artifact(f"{project}-{NAME}", type="model")
    artifact.add_dir(str(run_dir / "subnets"))
    run.log_artifact(artifact)
    run.finish()


def _log_to_mlflow(project: str, run_dir: Path, result: dict[str, Any]) -> None:
    import mlflow  # pyright: ignore[reportMissingImports]

    heads, rows = list_networks(result)
    mlflow.set_experiment(project)
    with mlflow.start_run(run_name=NAME):
        columns = {head: [row[i] for row in rows] for i, head in enumerate(heads)}
        mlflow.log_table(columns, f"{NAME}.json")
        mlflow.log_artifacts(str(run_dir / "subnets"), "subnets")


LOG = {"wandb": _log_to_wandb, "mlflow": _log_to_mlflow}
