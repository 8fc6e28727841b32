"""What a Python user may call; each name is documented where it is defined."""

from cacp_ray.pruning.subnet import load_subnet
from cacp_ray.rundir.finetuned import save_finetuned
from cacp_ray.workflows.analyze import Analysis, analyze
from cacp_ray.workflows.compare import compare
from cacp_ray.workflows.export import export
from cacp_ray.workflows.finetune import finetune
from cacp_ray.workflows.search import Run, search
from cacp_ray.workflows.series import search_each
from cacp_ray.workflows.train import train_model
from cacp_ray.workflows.tune_agent import tune_agent

__all__ = [
    "Analysis",
    "Run",
    "analyze",
    "compare",
    "export",
    "finetune",
    "load_subnet",
    "save_finetuned",
    "search",
    "search_each",
    "train_model",
    "tune_agent",
]
