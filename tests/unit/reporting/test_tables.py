import dataclasses
import io
import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cacp_ray.reporting.tables import (
    MANY_GROUPS,
    answers_table,
    final_table,
    frontier_table,
    groups_table,
    make_console,
    shorten_names,
)
from tests.toy import toy_cost_model
from tests.unit.reporting.synthetic import make_result


def render(content, width: int = 100) -> str:
    file = io.StringIO()
    Console(file=file, width=width, no_color=True).print(content)
    return file.getvalue()


def test_all_rates_and_paths_are_in_the_table():
    text = render(final_table(make_result((0.2, 0.4, 0.6))))
    for rate in ("0.20", "0.40", "0.60"):
        assert text.count(f"\n{rate} ") == 2  # once in each of the stacked tables
        assert f"subnets/rate-{rate}" in text


def test_a_value_in_square_brackets_is_no_markup():
    result = make_result((0.5,)) | {"name": "[red]run[/red]"}
    result["rates"][0]["path"] = "runs/[bold]/x"
    text = render(final_table(result))
    assert "[red]run[/red]" in text
    assert "runs/[bold]/x" in text


def test_missing_values_are_shown_as_dashes():
    row = next(
        line
        for line in render(final_table(make_result((0.5,), is_finetuned=False))).splitlines()[::-1]
        if line.startswith("0.50 ")
    )
    assert row.split()[-1] == "\N{EN DASH}"


def test_the_standard_errors_stand_below():
    assert "Standard error (binomial) on the search split" in render(final_table(make_result()))


def test_the_frontier_has_a_row_for_each_answer():
    text = render(frontier_table(make_result(num_frontier=8)))
    assert sum(line.strip().startswith("0.") for line in text.splitlines()) == 8
    assert frontier_table(make_result(num_frontier=0)).rows == []


def test_without_a_terminal_there_is_no_colour_and_the_width_is_fixed(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    file = io.StringIO()
    console = make_console(file)
    console.print(final_table(make_result()))
    assert console.width == 110
    assert "\x1b" not in file.getvalue()


def inspect(cost_model, fixed=None, width=80, **options):
    least = np.maximum(cost_model.num_channels // 10, 1)
    options = {"base_channels": {}, "with_members": False} | options
    table = groups_table(
        "a net",
        "input 3x32x32",
        cost_model,
        least,
        fixed or {"fc": "output"},
        **{"uncounted": ""} | options,
    )
    return render(table, width), least


@pytest.mark.parametrize("num_groups", [3, MANY_GROUPS, MANY_GROUPS + 1, 60])
def test_every_group_is_in_a_row_with_what_its_cut_alone_would_save(num_groups):
    model = toy_cost_model(num_groups)
    text, least = inspect(model)
    rows = [
        line.split() for line in text.splitlines() if line.split()[-1:] in (["inner"], ["residual"])
    ]
    assert max(map(len, text.splitlines())) <= 80
    assert len(rows) == num_groups  # of one model, `conv3` and `conv4` do different things
    whole = model.num_channels
    for index, (name, *_, channels, fewest, macs, params, kind) in enumerate(rows):
        counts = whole.copy()
        counts[index] = least[index]
        assert name == f"conv{index}"
        assert (int(channels), int(fewest)) == (whole[index], least[index])
        assert float(macs) == pytest.approx(
            100 * (1 - model.macs(counts) / model.macs(whole)), abs=0.06
        )
        assert float(params) == pytest.approx(
            100 * (1 - model.params(counts) / model.params(whole)), abs=0.06
        )
        assert kind == ("residual" if model.groups[index].is_residual else "inner")
    assert f"{int(model.macs(whole)):,} MACs" in text


def test_the_smallest_rate_shown_is_reachable():
    for seed in range(20):
        model = toy_cost_model(6, seed)
        text, least = inspect(model)
        shown = float(re.search(r"share of MACs kept\): (\S+) to 1", text)[1])
        assert 0 <= shown - model.macs(least) / model.macs(model.num_channels) <= 1e-4


def test_many_alike_groups_share_a_row():
    model = toy_cost_model(40)
    groups = tuple(
        dataclasses.replace(group, name=f"block.{index}.conv1", num_channels=12, is_residual=False)
        for index, group in enumerate(model.groups)
    )
    model = dataclasses.replace(model, groups=groups)
    text, _ = inspect(model)
    assert re.search(r"^block\.\{0\.\.39\}\.conv1 +40 ", text, re.MULTILINE)
    text, _ = inspect(model, with_members=True)
    assert len(re.findall(r"^block\.\d+\.conv1 ", text, re.MULTILINE)) == 2 * 40


def test_reasons_that_differ_in_a_name_are_one_line_with_the_number_of_layers():
    fixed = {f"a.{i}.conv": f"input of the grouped convolution a.{i}.mix" for i in range(9)}
    fixed |= {f"{letter}.fc": "output of the network" for letter in "bcdefgh"}
    text, _ = inspect(toy_cost_model(3), fixed, width=200)
    assert "stays whole (input of the grouped convolution ...): 9 layers: a.{0..8}.conv\n" in text
    assert "(output of the network): 7 layers: b.fc, c.fc, d.fc and 4 more (--members)" in text
    text, _ = inspect(toy_cost_model(3), fixed, width=200, with_members=True)
    assert "b.fc, c.fc, d.fc, e.fc, f.fc, g.fc, h.fc\n" in text


def test_a_cut_network_shows_the_channels_before_the_cut():
    model = toy_cost_model(3)
    text, _ = inspect(model, base_channels={"conv1": 64})
    row = next(line for line in text.splitlines() if line.startswith("conv1"))
    assert f" {model.groups[1].num_channels} of 64 " in row


def expand(short: str) -> list[str]:
    """Expands braces as a shell does."""
    choices = []
    for text, braces in re.findall(r"([^{]+)|\{([^}]*)\}", short):
        numbers = []
        for span in braces.split(",") if braces else []:
            first, _, last = span.partition("..")
            numbers += [str(n) for n in range(int(first), int(last or first) + 1)]
        choices.append(numbers or [text])
    return ["".join(parts) for parts in itertools.product(*choices)]


number = st.integers(0, 12)
name = st.one_of(
    st.builds("layer{}.{}.conv{}".format, number, number, number),
    st.builds("layer{}.conv".format, number),
    st.builds("{}.{}".format, number, number),
    st.just("stem"),
)


@given(st.lists(name, unique=True, max_size=30))
def test_shortened_names_stand_for_exactly_the_names(names):
    short = shorten_names(names)
    assert sorted(itertools.chain(*short.values())) == list(range(len(names)))
    for text, indices in short.items():
        assert sorted(expand(text)) == sorted(names[index] for index in indices)


def test_whole_blocks_become_one_name():
    names = [f"layer{i}.{j}.conv{k}" for i in (1, 2) for j in range(3) for k in (1, 2)]
    assert list(shorten_names(names)) == ["layer{1..2}.{0..2}.conv1", "layer{1..2}.{0..2}.conv2"]


def test_the_answers_of_a_policy_are_told_apart_from_what_was_searched_and_saved():
    scored = {"rate": 0.5, "cost_kept": 0.499, "macs": 19_960_000, "policy_score": 0.8}
    alone = scored | {"scored_score": 0.8, "score": 0.8}
    text = render(answers_table("Subnets", make_result(), [alone]))
    assert "policy" in text
    assert not {"best", "saved"} & set(text.split())
    answer = scored | {"scored_score": 0.82, "score": 0.85, "path": "subnets/rate-0.50"}
    text = render(answers_table("Subnets", make_result(), [answer]))
    row = next(line for line in text.splitlines() if line.strip().startswith("0.50"))
    assert row.split()[-3:] == ["80.00", "82.00", "85.00"]


def test_a_cut_from_a_trained_subnet_says_from_which():
    cut = {"rate": 0.5, "cost_kept": 0.499, "macs": 19_960_000, "score": 0.85, "cut_from": 0.7}
    text = render(answers_table("Subnets", make_result(), [cut]))
    row = next(line for line in text.splitlines() if line.strip().startswith("0.50"))
    assert row.split()[-2:] == ["0.70", "85.00"]
    assert "policy" not in text
