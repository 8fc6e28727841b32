"""The model card of subnets that are published: what they are, what they score, how they load."""

from collections.abc import Sequence
from typing import Any

import jinja2

from cacp_ray.io.rates import format_rate
from cacp_ray.reporting.summary import (
    format_macs,
    format_percent,
    short_columns,
    standard_errors,
    summary_rows,
)

CARD = """---
library_name: cacp-ray
tags: [pruning, channel-pruning, model-compression, pytorch]
{% if classes %}
pipeline_tag: image-classification
{% endif %}
---

# {{ title }}

Channel-pruned networks of `{{ model }}`: plain `torch.nn.Module`s with fewer channels.

{{ about }}

```python
{{ code }}
```

`pip install cacp-ray` brings the whole framework. To load a network, `pip install --no-deps
cacp-ray` is enough beside `torch numpy safetensors pydantic pyyaml huggingface_hub`.

Input: {{ input }}.
{% for figure in figures %}

![{{ figure }}]({{ figure }})
{% endfor %}

A rate is the share of the cost that is kept. `subnet.json` says which channels of which group were
kept, `model.safetensors` holds the weights after the search, `finetuned.safetensors` those after
training.
"""


def write_card(
    title: str, description: dict[str, Any], about: str, code: str, *, figures: Sequence[str]
) -> str:
    """The Markdown of a card.

    Args:
        title: Its heading.
        description: Content of a subnet's subnet.json.
        about: What the networks score, in Markdown.
        code: Python that loads one.
        figures: Names of image files beside the card.
    """
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
    return environment.from_string(CARD).render(
        title=title,
        model=description["model"],
        about=about,
        code=code,
        classes=description.get("classes"),
        input=_describe_input(description),
        figures=figures,
    )


def describe_rates(result: dict[str, Any]) -> str:
    """A table of the rates of a run, with standard errors."""
    columns, rows = short_columns(result), summary_rows(result)
    heads = [f"{column.head} ({column.unit})" if column.unit else column.head for column in columns]
    lines = [heads, ["---"] * len(columns), *([c.text(row) for c in columns] for row in rows)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    errors = standard_errors(result)
    note = f"\n\nStandard error (binomial): {'; '.join(errors)}." if errors else ""
    return table + note


def describe_subnet(description: dict[str, Any], is_finetuned: bool) -> str:
    """Size of one subnet in a sentence."""
    kept, cost = format_percent(description["cost_kept"]), description.get("cost", "macs")
    after = "after fine-tuning" if is_finetuned else "as the search left it, not fine-tuned"
    return (
        f"Rate {format_rate(description['rate'])}: {kept} % of the "
        f"{'MACs' if cost == 'macs' else cost} are kept, {format_macs(description['macs'])} "
        f"MACs, {description['params']:,} parameters; "
        f"{after}."
    )


def _describe_input(description: dict[str, Any]) -> str:
    if description.get("inputs"):
        return "the tensors that `subnet.json` describes under `inputs`"
    shape = " x ".join(map(str, description["input_shape"]))
    if description.get("mean") is None:
        return f"a float32 tensor of {shape} for each example"
    return (
        f"float32 images of {shape} (channels, height, width), scaled to [0, 1] and normalised "
        f"with mean {description['mean']} and standard deviation {description['std']}"
    )
