"""Files of weights as people save them: state dicts among other things, names with prefixes.

What is taken and what is left out is logged, so that nobody is surprised by the weights of a moving
average.
"""

import logging
from collections.abc import Collection, Mapping
from typing import Any, TypeGuard

from torch import Tensor

from cacp_ray.errors import ArtifactError

logger = logging.getLogger(__name__)

# Keys under which training scripts keep a state dict; the first that is there is taken.
KEYS = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params",
    "module", "ema", "ema_state_dict", "model_ema", "state_dict_ema",
)  # fmt: skip
COUNTERS = ("num_batches_tracked",)


def find_state_dict(content: Any, file: str) -> Mapping[str, Tensor]:
    """The state dict in what a file holds: the content itself, or one of its entries.

    Raises:
        ArtifactError: There is none.
    """
    if is_state_dict(content):
        return content
    entries = content if isinstance(content, dict) else {}
    found = [key for key, value in entries.items() if is_state_dict(value)]
    chosen = next((key for key in KEYS if key in found), None)
    if chosen is None:
        keys = ", ".join(map(str, list(entries)[:6])) or type(content).__name__
        raise ArtifactError(
            f"weights {file}: holds no state dict (it has {keys}); save model.state_dict()"
        )
    others = [str(key) for key in found if key != chosen]
    also = f"; it also has {', '.join(others)}" if others else ""
    logger.info("weights %s: the state dict under %s is taken%s", file, chosen, also)
    return entries[chosen]


def is_state_dict(value: Any) -> TypeGuard[Mapping[str, Tensor]]:
    """Whether it maps names to tensors, at least one."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(key, str) and isinstance(v, Tensor) for key, v in value.items())
    )


def strip_prefix(
    tensors: Mapping[str, Tensor], own: Collection[str], file: str
) -> Mapping[str, Tensor]:
    """The tensors under the names that a network has, where a wrapper has put a word before them.

    `module.` comes from DataParallel, `_orig_mod.` from torch.compile, `backbone.` or `model.` from
    frameworks. A prefix goes if exactly one leaves all names of the network.
    """
    prefix = prefix_of(tensors, own)
    inner = {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
    if prefix:
        left = len(tensors) - len(inner)
        others = f"; other names, left out: {left}" if left else ""
        logger.info("weights %s: the prefix %s of %d names is taken off%s",
                    file, prefix, len(inner), others)  # fmt: skip
    return inner


def prefix_of(names: Collection[str], own: Collection[str]) -> str:
    """The words that stand before all names of a network; empty without them, or where unclear."""
    needed = {name for name in own if not name.endswith(COUNTERS)}
    prefix, inner = "", set(names)
    while not needed <= inner:
        shorter = {
            word: {name[len(word) + 1 :] for name in inner if name.startswith(f"{word}.")}
            for word in {name.partition(".")[0] for name in inner}
        }
        fitting = [word for word, rest in shorter.items() if _leads_to(needed, rest)]
        if len(fitting) != 1:
            return ""
        (word,) = fitting
        prefix, inner = f"{prefix}{word}.", shorter[word]
    return prefix


def _leads_to(needed: set[str], names: set[str]) -> bool:
    """Whether the names are those that are needed, or have them behind one more word."""
    if needed <= names:
        return True
    words = {name.partition(".")[0] for name in names}
    return any(
        needed <= {n.partition(".")[2] for n in names if n.startswith(f"{w}.")} for w in words
    )
