"""The copy of a run on shared or object storage: opened for a search, a tuning, a fine-tuning."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cacp_ray.config.run import Section
from cacp_ray.config.saved import check_unchanged, is_run, read_run_config
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.io.files import read_json, write_json
from cacp_ray.io.places import overlaps
from cacp_ray.rundir.mirror import RunMirror

PUSH_SECONDS = 30.0
RESULT_FILE = "result.json"
TRIALS_FILE = "trials.json"  # where the trials of a tuning write, if not in its folder


def open_for_search(uri: str, folder: Path, config: Section, resume: bool) -> RunMirror:
    """The mirror of a run that is to be searched; what it holds is in the folder afterwards.

    Raises:
        ConfigError: The place is none, or lies in the folder, or holds another run.
        ArtifactError: It holds a run, and `resume` is off; or reading fails.
    """
    mirror = _connect(uri, folder)
    if resume:
        if (saved := mirror.config) is not None:
            check_unchanged(saved, config, f"storage {uri}", "--storage")
        mirror.pull(folder)
    elif mirror.config is not None:
        raise ArtifactError(
            f"storage {uri} holds a run: pass --resume (in Python resume=True) to continue it, or "
            "choose another --storage"
        )
    return mirror


def open_for_training(storage: str | Path | RunMirror, folder: Path) -> RunMirror:
    """The mirror of a run that was searched, which is fetched where the folder does not hold it.

    Raises:
        ConfigError: The place is none, or lies in the folder, or holds another run or none.
        ArtifactError: The folder holds an older state than the storage, or reading fails.
    """
    if isinstance(storage, RunMirror):
        return storage
    mirror = _connect(str(storage), folder)
    saved = mirror.config
    if is_run(folder):
        if saved is not None:
            check_unchanged(saved, read_run_config(folder), f"storage {mirror.uri}", "--storage")
    elif saved is None:
        raise ConfigError(
            f"{folder} is no run, and storage {mirror.uri} holds none: search first, with the same "
            "--storage, or name the run's own folder"
        )
    mirror.pull(folder)
    return mirror


def open_for_tuning(uri: str, folder: Path, config: Section, resume: bool) -> RunMirror:
    """As `open_for_search`, for a tuning of the agent.

    Raises:
        ConfigError: As there.
        ArtifactError: As there; or the tuning ended elsewhere, and the folder does not know it.
    """
    mirror = open_for_search(uri, folder, config, resume)
    if resume and mirror.holds(RESULT_FILE) and not (folder / RESULT_FILE).exists():
        raise ArtifactError(
            f"{uri} holds the result of a tuning that {folder} lacks: remove the folder or choose "
            "another --run-dir, and it is fetched from there"
        )
    return mirror


def check_trials_place(folder: Path, trials: str | None) -> None:
    """Refuses to have the trials of a tuning write elsewhere than before.

    Args:
        folder: Folder of the tuning.
        trials: Their place in a storage; None for the folder itself.

    Raises:
        ConfigError: They would begin anew there.
    """
    file = folder / TRIALS_FILE
    if (folder / "tune").exists():
        before = None
    elif file.exists():
        before = read_json(file)["path"]
    else:
        before = trials
    if before != trials:
        step = "leave out --storage" if before is None else "give the --storage that it began with"
        raise ConfigError(
            f"the trials of {folder} write to {before or folder / 'tune'}, and would begin anew: "
            f"{step}"
        )


def note_trials_place(folder: Path, trials: str | None) -> None:
    """Notes where the trials of a tuning write, for `check_trials_place`."""
    if trials is not None:
        write_json(folder / TRIALS_FILE, {"path": trials})


@contextmanager
def training_into(mirror: RunMirror | None, folder: Path) -> Iterator[None]:
    """Keeps other drivers from training into the storage, and brings it up to date in the end.

    Raises:
        ArtifactError: Another driver trains into it, or it does not take the last files.
    """
    if mirror is None:
        yield
        return
    with mirror.held():
        yield
        mirror.finish(folder)
        mirror.drop_checkpoints()


def make_push(mirror: RunMirror | None, folder: Path) -> Callable[[], None]:
    """A function that copies new files of a run, twice a minute at most.

    It raises ArtifactError where another driver trains into the storage.
    """
    pushed = -math.inf

    def push() -> None:
        nonlocal pushed
        if mirror is not None:
            mirror.check_held()
        if mirror is not None and time.monotonic() > pushed + PUSH_SECONDS:
            mirror.push(folder)
            pushed = time.monotonic()

    return push


def _connect(uri: str, folder: Path) -> RunMirror:
    if overlaps(uri, folder):
        raise ConfigError(
            f"storage {uri} and {folder}, which it shall be a copy of, lie in each other: choose "
            "another"
        )
    return RunMirror(uri)
