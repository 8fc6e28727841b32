"""docs/strategies.md lists every strategy, and the strategy that it shows runs by its name."""

import re
import sys
import types
from pathlib import Path

import pytest
import typer.main

from cacp_ray.cli import app
from cacp_ray.config.reading import load_config
from cacp_ray.config.run import RunConfig
from cacp_ray.errors import ConfigError
from cacp_ray.searching.strategies import ALL_STRATEGIES, SEPARATE
from cacp_ray.searching.strategies.table import make_strategy
from tests.toy import measure_by_formula, toy_score
from tests.unit.searching.test_strategies import RATES, problem, toy_cost_model

PAGE = Path("docs/strategies.md").read_text()


def test_the_page_lists_every_strategy_and_how_it_serves_rates():
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| ([^|]+) \|[^|]*\|$", PAGE, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted({*ALL_STRATEGIES})
    for name, rates in rows:
        # `cacp-ray compare` uses these words.
        assert rates == ("separately" if name in SEPARATE else "together"), name


def test_help_of_search_lists_every_strategy():
    (option,) = [
        parameter for parameter in typer.main.get_command(app).commands["search"].params
        if parameter.name == "strategy"
    ]  # fmt: skip
    listed = option.help.split("or package.module:function")[0].split(", ")
    assert {name for name in listed if name} == {*ALL_STRATEGIES}


def test_a_strategy_of_the_user_s_own_is_named_in_the_configuration(monkeypatch, capsys):
    module = types.ModuleType("mine")
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(block, module.__dict__)
    monkeypatch.setitem(sys.modules, "mine", module)
    name = load_config(RunConfig, {}, ["strategy=mine:halves"]).strategy
    strategy = make_strategy(name, problem(toy_cost_model()))
    asked = []
    while proposals := strategy.ask(6):
        asked += proposals
        strategy.tell(measure_by_formula(proposals, toy_score(toy_cost_model())))
    assert [p.rate for p in asked] == [rate for rate in RATES for _ in range(2)]
    assert capsys.readouterr().out.count("\n") == 3


@pytest.mark.parametrize(
    ("name", "says"),
    [("unifrom", "did you mean uniform"), ("no.such:thing", "cannot be imported")],
)
def test_an_unknown_strategy_is_refused_in_one_line(name, says):
    with pytest.raises(ConfigError, match=says):
        make_strategy(
            load_config(RunConfig, {"strategy": name}).strategy, problem(toy_cost_model())
        )
