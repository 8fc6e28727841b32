"""Run directories from outside: which configuration they hold, and whether they may be written."""

from pathlib import Path
from typing import Any

from cacp_ray.config.reading import load_config, resolved
from cacp_ray.config.run import RunConfig, Section
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.io.files import changed_keys, check_writable
from cacp_ray.models.factory import check_origin, import_beside

FORMER_LR = 0.02  # the default of earlier versions, written into their runs
# No measurement of the search depends on these.
MAY_CHANGE = (
    *("cluster.max_evaluators", "cluster.label_selector"),
    *("report.frontier", "report.learning", "report.latency"),
)


def open_folder(run_dir: Path, config: Section, *, resume: bool) -> None:
    """Refuses to write over another run, or to continue one under a changed configuration.

    Raises:
        ArtifactError: It exists and `resume` is off, or there is nothing to resume.
        ConfigError: It was started with another configuration; the message names the keys.
    """
    saved = run_dir / "config.yaml"
    if not resume:
        use = "pass --resume (in Python resume=True) to continue it"
        check_new(run_dir, use, "choose another --run-dir")
        return
    if not saved.exists():
        raise ArtifactError(f"{run_dir} holds no run (no config.yaml): start it without --resume")
    check_unchanged(saved, config, f"{run_dir}", "--run-dir")


def check_new(folder: Path, use: str, other: str) -> None:
    """Tries whether a new folder can be filled at a place, and leaves everything as it was.

    Args:
        folder: The place.
        use: What to do with the folder that is there already, for messages.
        other: How to name another place, for messages.

    Raises:
        ArtifactError: Files lie there, or nothing can be written there.
    """
    try:
        # A kill during the first write leaves a hidden file.
        is_taken = folder.exists() and (
            not folder.is_dir() or any(path.name[0] != "." for path in folder.iterdir())
        )
        if not is_taken:
            check_writable(folder)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise ArtifactError(
            f"{ascii(str(folder))[:100]} cannot be written ({reason}): {other}"
        ) from error
    if is_taken:
        raise ArtifactError(f"{folder} exists: {use}, or {other}")


def check_unchanged(saved: Path | dict[str, Any], config: Section, where: str, option: str) -> None:
    """Refuses to continue a run under another configuration.

    Args:
        saved: Configuration at the start: a file or its content.
        config: Configuration now.
        where: Run folder or storage, for messages.
        option: Command-line option that names it, for messages.

    Raises:
        ConfigError: They differ in a key that measurements or results depend on.
    """
    changed = changed_keys(
        resolved(load_config(type(config), saved, is_saved=True)), resolved(config)
    )
    changed = [
        key for key in changed if not f"{key}.".startswith(tuple(f"{k}." for k in MAY_CHANGE))
    ]
    if "finetune.lr" in changed and config.model_dump()["finetune"]["lr"] == "auto":
        before = load_config(type(config), saved, is_saved=True).model_dump()["finetune"]["lr"]
        changed = [key for key in changed if key != "finetune.lr" or before != FORMER_LR]
    if changed:
        raise ConfigError(
            f"{where} was started with another configuration; changed: {', '.join(changed)}; "
            f"undo the change or choose another {option}"
        )


def is_run(folder: Path) -> bool:
    """Whether a run was begun there."""
    return (folder / "config.yaml").exists()


def import_code_of(subnet: Path) -> None:
    """Imports the code of the network that the run of a subnet names, so that it may name it too.

    Only code in the user's own folders needs that (`cacp_ray.io.code`).

    Raises:
        ConfigError: The run's configuration cannot be read, or names code that lies in the run.
    """
    run = subnet.absolute().parent.parent
    if (subnet / "subnet.json").exists() and is_run(run):
        import_beside(read_run_config(run).model.name)


def read_run_config(run_dir: Path) -> RunConfig:
    """The configuration that a run was started with.

    Raises:
        ArtifactError: The folder holds no run.
        ConfigError: The configuration cannot be read, or names code that lies in the folder.
    """
    if not is_run(run_dir):
        raise ArtifactError(f"{run_dir} holds no run (no config.yaml): check the path")
    config = load_config(RunConfig, run_dir / "config.yaml", is_saved=True)
    for name in (config.model.name, config.strategy, config.pruning.criterion, config.task or ""):
        check_origin(name, run_dir)
    return config
