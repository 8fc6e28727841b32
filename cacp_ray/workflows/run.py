"""A finished run, for Python users: its subnets, its policy, its fine-tuning and its report."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cacp_ray.config.saved import read_run_config
from cacp_ray.reporting.run_report import report_run
from cacp_ray.rundir.mirror import RunMirror
from cacp_ray.training.recipe import Order
from cacp_ray.workflows.answers import answer_rates
from cacp_ray.workflows.finetune import finetune
from cacp_ray.workflows.finetune_own import finetune_by_task
from cacp_ray.workflows.problem import Given
from cacp_ray.workflows.storage import open_for_training


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: Its directory.
        result: The content of result.json.
        mirror: The copy of the run on other storage, if there is one; `finish` brings it up to
            date.
        given: Network and task that were given as objects; None where there are none.
    """

    path: Path
    result: dict[str, Any] = field(repr=False)
    mirror: RunMirror | None = field(default=None, repr=False)
    given: Given | None = field(default=None, repr=False)

    @property
    def subnets(self) -> dict[float, Path]:
        """Folder of the subnet of every rate; `load_subnet` reads one."""
        return {row["rate"]: self.path / row["path"] for row in self.result["rates"]}

    def policy(self, rate: float, evaluations: int = 0) -> dict[str, Any]:
        """The policy's subnet for any rate; see `cacp_ray.workflows.answers.answer_rates`."""
        return answer_rates(self.path, [rate], evaluations, save=False, given=self.given)[0]

    def finetune(
        self,
        train: Callable[..., object] | str | None = None,
        *,
        order: Order | None = None,
        resume: bool = False,
        address: str | None = None,
        storage: str | Path | None = None,
    ) -> dict[str, Any]:
        """Trains the subnet of every rate; returns the content of result.json.

        A task of the user's own is trained by `train(net, context)`, or by its own method of that
        name (`cacp_ray.workflows.finetune_own`); images of classes as by `cacp_ray.finetune`.
        `order` replaces `finetune.order` of the run. With `storage`, or where the search had one,
        trials write there, and so do nodes that share no folder.
        """
        mirror = self.mirror if storage is None else open_for_training(storage, self.path)
        if train is None and self.given is None and read_run_config(self.path).task is None:
            overrides = [] if order is None else [f"finetune.order={order}"]
            result = finetune(
                self.path,
                overrides=overrides,
                resume=resume,
                address=address,
                storage=mirror,
            )
        else:
            result = finetune_by_task(
                self.path,
                train,
                given=self.given,
                order=order,
                resume=resume,
                address=address,
                mirror=mirror,
            )
        self.result.update(result)
        return result

    def report(self) -> Path:
        """Writes report.html."""
        return report_run(self.path)
