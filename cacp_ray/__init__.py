"""cacp_ray: conditional automated channel pruning of CNNs on Ray.

`analyze`, `search`, `finetune` and `load_subnet` are imported when first used: `import cacp_ray`
alone imports neither torch nor ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cacp_ray.io.code import extend_path

if TYPE_CHECKING:
    from cacp_ray.api import (
        Analysis,
        Run,
        analyze,
        compare,
        export,
        finetune,
        load_subnet,
        save_finetuned,
        search,
        search_each,
        tune_agent,
    )

__version__ = "0.2.0"
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
    "tune_agent",
]

LIGHT = {
    "export": "cacp_ray.workflows.export",
    "load_subnet": "cacp_ray.pruning.subnet",
    "save_finetuned": "cacp_ray.rundir.finetuned",
}

extend_path()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'cacp_ray' has no attribute {name!r}")
    if name in LIGHT:  # who only loads a network needs neither ray nor what reports need
        return getattr(import_module(LIGHT[name]), name)
    from cacp_ray import api

    return getattr(api, name)
