import io

from rich.console import Console

from cacp_ray.reporting.tables import final_table, frontier_table, make_console
from tests.unit.reporting.synthetic import make_result


def render(content, width: int = 100) -> str:
    file = io.StringIO()
    Console(file=file, width=width, no_color=True).print(content)
    return file.getvalue()


def test_all_rates_and_paths_are_in_the_table():
    text = render(final_table(make_result((0.2, 0.4, 0.6))))
    for rate in ("0.20", "0.40", "0.60"):
        assert text.count(f" {rate} ") == 2  # once in each of the stacked tables
        assert f"subnets/rate-{rate}" in text


def test_no_figure_is_cut_at_100_columns():
    rates = tuple(round(0.08 * i, 2) for i in range(1, 13))
    result = make_result(rates)
    result["base"]["macs"] = 15_470_264_320
    text = render(final_table(result))
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert max(map(len, text.splitlines())) <= 100
    table = text.split("What you got")[1].split("How good")[0]
    assert len([line for line in table.splitlines() if "subnets/rate-" in line]) == len(rates)


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
        if " 0.50 " in line
    )
    assert row.split()[-3:] == ["\N{EN DASH}"] * 3


def test_the_standard_errors_stand_below():
    assert "Standard error (binomial) on the search split" in render(final_table(make_result()))


def test_the_frontier_has_a_row_for_each_answer():
    text = render(frontier_table(make_result(num_frontier=8)))
    assert sum(line.strip().startswith("0.") for line in text.splitlines()) == 8
    assert frontier_table(make_result(num_frontier=0)).row_count == 0


def test_without_a_terminal_there_is_no_colour_and_the_width_is_fixed(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    file = io.StringIO()
    console = make_console(file)
    console.print(final_table(make_result()))
    assert console.width == 110
    assert "\x1b" not in file.getvalue()
