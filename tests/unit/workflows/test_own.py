"""Searches of networks and scores that are a user's own: objects, functions, tasks by name."""

import dataclasses
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import cacp_ray
from cacp_ray.config.reading import load_config
from cacp_ray.config.run import RunConfig
from cacp_ray.errors import ConfigError, EvaluationError
from cacp_ray.evaluation.measurement import Candidate
from cacp_ray.evaluation.task import FunctionTask, OwnTask, read_score
from cacp_ray.evaluation.task_scorer import TaskScorer
from cacp_ray.pruning.calibration import find_inputs, read_examples
from cacp_ray.searching.budget import uniform
from cacp_ray.workflows.dry_run import check_search
from cacp_ray.workflows.evaluators import find_gpu_share
from cacp_ray.workflows.problem import Given
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.winners import build_here, build_winners
from tests.unit.workflows.test_winners import record

CONFIG = load_config(
    RunConfig, {"model": {"name": "python:Twins"}, "task": "python:task", "rates": [0.5]}
)


class Twins(nn.Module):
    """Two inputs of unequal sides, a dictionary out, and batch norms."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(2, 8, 3, padding=1)
        self.norm, self.out = nn.BatchNorm2d(8), nn.Conv2d(8, 1, 1)

    def forward(self, a, b):
        return {"sum": self.out(self.norm(self.left(a) + self.right(b)).relu())}


def pair(number):
    return torch.randn(number, 1, 6, 8), torch.randn(number, 2, 6, 8)


def batches(count=4):
    for seed in range(count):
        torch.manual_seed(seed)
        yield (pair(5), torch.tensor([seed] * 5))


def score(net, figures=None):
    torch.manual_seed(1)
    value = -float(net(*pair(3))["sum"].abs().mean())
    return value if figures is None else {"score": value, **figures}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Twins().eval()


def make_task(score=score, **others):
    return FunctionTask(pair(1), batches, score, **others)


def set_up(model, task=None, *, criterion="cap", config=CONFIG):
    pruning = config.pruning.model_copy(update={"criterion": criterion})
    given = Given(model, task or make_task())
    return Setup.create(config.model_copy(update={"pruning": pruning}), None, given)


def test_the_whole_network_is_scored_by_the_function(model):
    setup = set_up(model)
    assert setup.first.score == score(model)
    assert len(setup.calibration) == 20
    assert setup.task.describe() == {"task": "python:task"}


@pytest.mark.parametrize("recovery", ["none", "bn", "compensate"])
def test_a_candidate_that_keeps_all_scores_as_the_whole_network(model, recovery):
    config = load_config(RunConfig, CONFIG.model_dump(), [f"pruning.recovery={recovery}"])
    setup = set_up(model, config=config).prepare()
    scorer = TaskScorer(setup.prepared, setup.task, recovery=recovery)
    counts = tuple(setup.plan.cost_model.num_channels.tolist())
    measured = scorer(Candidate(1.0, counts, index=7))
    assert measured.index == 7
    if recovery != "bn":  # whose statistics are those of the calibration data
        assert measured.score == pytest.approx(score(model), rel=1e-4)


def test_a_cut_candidate_is_repaired(model):
    wanted = {}
    for recovery in ("none", "compensate"):
        config = load_config(RunConfig, CONFIG.model_dump(), [f"pruning.recovery={recovery}"])
        torch.manual_seed(3)
        inputs = pair(64)
        with torch.no_grad():
            truth = model(*inputs)["sum"]

        def closeness(net, inputs=inputs, truth=truth):
            return -float((net(*inputs)["sum"] - truth).square().mean())

        setup = set_up(model, make_task(closeness), config=config).prepare()
        counts = uniform(setup.budget, [0.5], np.ones(len(setup.plan.groups)))[0]
        scorer = TaskScorer(setup.prepared, setup.task, recovery=recovery)
        wanted[recovery] = scorer(Candidate(0.5, tuple(counts.tolist()), index=0)).score
    assert wanted["compensate"] > wanted["none"]


def spoil(net, way):
    if way == "weights":
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(1)
    elif way == "mode":
        net.train()
        net(*pair(2))
    elif way == "hooks":
        net.calls = getattr(net, "calls", 0) + 1
        net.left.register_forward_hook(lambda module, inputs, output: output + net.calls)
    elif way == "training":
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        with torch.enable_grad():
            net(*pair(2))["sum"].square().mean().backward()
        optimizer.step()
    else:
        net.left.weight = nn.Parameter(torch.zeros_like(net.left.weight))
    return score(net.eval())


@pytest.mark.parametrize("way", ["weights", "mode", "hooks", "training", "replaced"])
def test_what_a_score_does_to_a_network_ends_with_it(model, way):
    setup = set_up(model, make_task(partial(spoil, way=way))).prepare()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scorer = TaskScorer(setup.prepared, setup.task, recovery="compensate")
    counts = tuple(setup.plan.cost_model.num_channels.tolist())
    first, second = (scorer(Candidate(1.0, counts, index=i)).score for i in range(2))
    assert first == second
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not setup.model.training


def test_a_task_by_name_is_made_once_in_a_process():
    name = f"{__name__}:Counted"
    Counted.made = 0
    setup = Setup.create(
        load_config(RunConfig, {"model": {"name": f"{__name__}:make_twins"}, "task": name})
    )
    assert OwnTask.make(name).content is setup.task.content
    assert Counted.made == 1


def make_twins():
    torch.manual_seed(0)
    return Twins()


class Counted:
    """A task that counts how often it is made."""

    made = 0
    metric = "closeness"

    def __init__(self):
        type(self).made += 1
        self.example_inputs = pair(1)

    def calibration(self):
        return batches()

    def score(self, net):
        return {"score": score(net), "loss": 2.0}


def test_figures_and_the_name_of_a_score_are_kept():
    task = OwnTask.make(f"{__name__}:Counted")
    assert task.metric.name == "closeness"
    scored = task.measure(make_twins())
    assert scored.figures == {"loss": 2.0}
    assert scored.loss == 2.0


def test_what_a_search_saves_is_exported(model, tmp_path):
    setup = set_up(model).prepare()
    counts = uniform(setup.budget, [0.5], np.ones(len(setup.plan.groups)))[0].tolist()
    best = dataclasses.replace(record(setup, counts), rate=0.5)
    (row,) = build_winners(setup, {0.5: best}, tmp_path, build_here(setup))
    folder = tmp_path / row["path"]
    done = cacp_ray.export(folder, "torch-export", model=model)
    inputs = pair(4)
    got = torch.export.load(done.path).module()(*inputs)
    torch.testing.assert_close(got, cacp_ray.load_subnet(folder, model=model)(*inputs))
    about = (folder / "README.md").read_text()
    assert "inputs are float32 (1, 6, 8), float32 (2, 6, 8), as your task has it" in about


def random_twins():
    return Twins()


@pytest.mark.parametrize(
    ("model", "task", "message"),
    [
        ("random_twins", "Counted", "other weights each time"),
        ("make_twins", "batches", r"no method calibration"),
        ("make_twins", "Nothing", r"cannot be imported"),
        ("make_twins", "Failing", r"task .*Failing cannot be made \(ZeroDivisionError"),
    ],
)
def test_what_a_task_lacks_is_one_line(model, task, message):
    values = {"model": {"name": f"{__name__}:{model}"}, "task": f"{__name__}:{task}"}
    with pytest.raises(ConfigError, match=message) as caught:
        Setup.create(load_config(RunConfig, values))
    assert "\n" not in str(caught.value)


class Failing:
    def __init__(self):
        1 / 0  # noqa: B018


def failing(net):
    raise KeyError("psnr\nof nothing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_network": lambda net: "good"}, "is of type str: return one number"),
        ({"score_network": lambda net: True}, "is of type bool"),
        ({"score_network": lambda net: (1, 2)}, "is of type tuple"),
        ({"score_network": lambda net: {"psnr": 1.0}}, "mapping with psnr: one entry must be"),
        ({"score_network": lambda net: {"score": 1.0, "x": "y"}}, "the task's x is of type str"),
        ({"score_network": lambda net: math.nan}, "whole network: .*not finite"),
        ({"score_network": failing}, r"fails on the whole network \(KeyError"),
        ({"make_loader": lambda: iter(())}, "yields no batch"),
        ({"make_loader": lambda: 3}, "gives no batches"),
        ({"make_loader": lambda: [torch.zeros(2, 1, 6, 8)]}, "yield the inputs first"),
        ({"make_loader": lambda: [{"a": torch.zeros(2, 1, 6, 8)}]}, "yield the inputs first"),
        ({"make_loader": lambda: (1 / 0 for _ in [1])}, r"loader fails \(ZeroDivisionError"),
        ({"example_inputs": [1, 2]}, "holds no tensor"),
        ({"example_inputs": "x"}, "is of type str"),
        ({"example_inputs": torch.zeros(1, 1, 6, 8)}, "does not run on example_inputs"),
        ({"metric": ""}, "metric is ''"),
    ],
)
def test_a_wrong_task_is_one_line_before_a_search(model, changes, message):
    given = {
        "example_inputs": pair(1), "make_loader": batches, "score_network": score
    } | changes  # fmt: skip
    with pytest.raises(Exception, match=message) as caught:
        set_up(model, FunctionTask(**given))
    assert getattr(caught.value, "exit_code", None) == 2
    assert "\n" not in str(caught.value)


def test_a_criterion_of_gradients_takes_the_loss_of_the_task(model):
    with pytest.raises(ConfigError, match=r"has no loss\(net, batch\)"):
        set_up(model, criterion="taylor").prepare()

    def loss(net, batch):
        inputs, numbers = batch
        return (net(*inputs)["sum"].mean((1, 2, 3)) - numbers).square().mean()

    setup = set_up(model, make_task(loss_of=loss), criterion="taylor").prepare()
    assert all(gate.absolute.any() for gate in setup.find_statistics().gates)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, {"score": 1.0, "mse": math.nan}])
def test_a_score_that_is_not_finite_is_a_failed_candidate(value):
    with pytest.raises(EvaluationError, match="not finite"):
        read_score(value)


@pytest.mark.parametrize("value", [3, 3.0, np.float32(3), torch.tensor(3.0), torch.tensor([3])])
def test_numbers_of_every_kind_are_scores(value):
    assert read_score(value).score == 3.0


def test_a_score_that_exits_is_a_failed_candidate():
    def leave(net):
        raise SystemExit(4)

    task = OwnTask.make("python:task", make_task(leave))
    with pytest.raises(EvaluationError, match=r"score exits \(4\)"):
        task.measure(nn.Identity())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda net, batch: 1.0, "of type float: return the mean"),
        (lambda net, batch: net(*batch[0])["sum"], r"a tensor \(5, 1, 6, 8\): return the mean"),
        (lambda net, batch: torch.zeros(()), "without a gradient: return the mean"),
        (lambda net, batch: 1 / 0, "loss fails on a calibration batch .ZeroDivisionError"),
    ],
)
def test_a_loss_without_a_gradient_is_refused_before_a_search(model, loss, message):
    with pytest.raises(ConfigError, match=message):
        set_up(model, make_task(loss_of=loss), criterion="taylor")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.rand(5, 3, 6, 8), torch.rand(5, 2, 6, 8)), "network fails on a calibration batch"),
        (tuple(t.double() for t in pair(5)), "of float64"),
        (pair(0), "calibration batch 0 is empty"),
        ((), "their inputs must be like"),
    ],
)
def test_batches_that_the_network_does_not_take_are_one_line(model, given, message):
    with pytest.raises(ConfigError, match=message):
        set_up(model, dataclasses.replace(make_task(), make_loader=lambda: [(given, 0)]))
    plan = cacp_ray.analyze(model, pair(1))
    with pytest.raises(ConfigError, match=message):
        plan.calibrate([(given, 0)])


def test_batches_of_every_kind_give_their_inputs():
    image, named = torch.zeros(2, 3, 4, 4), {"x": torch.zeros(2, 3), "y": torch.ones(2)}
    example, wanted = image[:1], {"x": named["x"][:1]}
    assert find_inputs(image, example) is image
    assert find_inputs((image, torch.ones(2)), example) is image
    assert find_inputs([image], example) is image
    assert find_inputs(named, wanted)["x"] is named["x"]
    assert find_inputs((named, torch.ones(2)), wanted)["x"] is named["x"]
    two = pair(2)
    assert find_inputs((*two, torch.ones(2)), pair(1)) == two
    assert find_inputs((two, torch.ones(2)), pair(1)) == two


def test_a_loader_is_read_as_far_as_it_is_needed():
    def endless():
        while True:
            yield torch.zeros(8, 1, 4, 4)

    assert len(read_examples(endless(), torch.zeros(1, 1, 4, 4), 20)) == 24


def test_a_dry_run_says_what_a_score_takes(tmp_path):
    values = {"model": {"name": f"{__name__}:make_twins"}, "task": f"{__name__}:Counted"}
    about = check_search(load_config(RunConfig, values), tmp_path / "run")
    assert "to score the whole network took" in about
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "cap"}, "needs a score that is a share"),
        ({"evaluation": {"racing": True}}, r"evaluation\.racing compares images"),
        ({"evaluation": {"images": 10}}, r"evaluation\.images: a task of your own"),
        ({"model": {"name": "torchvision:resnet18"}}, r"model\.weights is missing"),
    ],
)
def test_settings_of_images_are_refused(settings, message, tmp_path):
    values = {"model": {"name": f"{__name__}:make_twins"}, "task": f"{__name__}:Counted"}
    with pytest.raises(ConfigError, match=message):
        check_search(load_config(RunConfig, values | settings), tmp_path / "run")


def test_the_memory_of_a_task_on_a_gpu_is_not_measured(model):
    config = load_config(RunConfig, CONFIG.model_dump(), ["cluster.gpus_per_evaluator=auto"])
    with pytest.raises(ConfigError, match="give a share of a GPU for a task of your own"):
        find_gpu_share(set_up(model, config=config))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"task": "mine:Task", "score": score},
            r"^search\(task=\.\.\., score=\.\.\.\): a task brings",
        ),
        ({"task": "mine:Task", "calibration": batches}, "brings its own calibration"),
        ({"task": "mine:Task", "example_inputs": pair(1)}, "brings its own example_inputs"),
        ({"task": "mine:Task", "loss": score}, "brings its own loss"),
        ({"task": "mine:Task", "metric": "PSNR (dB)"}, "brings its own metric"),
        ({"calibration": list(batches()), "score": score}, "of type list.*write lambda: loader"),
        ({"score": 3.0}, "score is of type float, not a function"),
        ({"loss": 3.0}, "loss is of type float, not a function"),
        ({"example_inputs": pair(1)}, r"needs score=\.\.\. too"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused_in_one_line(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        cacp_ray.search(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "task", "form"),
    [("python:Twins", "Counted", "function"), ("make_twins", "python:task", "Class")],
)
def test_names_of_given_objects_mean_nothing_in_a_new_configuration(model, task, form):
    names = [name if ":" in name else f"{__name__}:{name}" for name in (model, task)]
    config = load_config(RunConfig, {"model": {"name": names[0]}, "task": names[1]})
    with pytest.raises(ConfigError, match=rf"in a new configuration, .*module:{form}$"):
        Setup.create(config)


def test_a_run_shows_itself_without_its_numbers(tmp_path):
    run = cacp_ray.api.Run(tmp_path, {"rates": list(range(1000))}, None, Given(None, make_task()))
    assert repr(run) == f"Run(path={tmp_path!r})"


@pytest.mark.parametrize(("rates", "words"), [([0.5], "network, .* it "), ([0.4, 0.5], "networks")])
def test_the_log_counts_networks(model, tmp_path, caplog, rates, words):
    setup = set_up(model).prepare()
    counts = [uniform(setup.budget, [rate], np.ones(len(setup.plan.groups)))[0] for rate in rates]
    best = {
        rate: dataclasses.replace(record(setup, kept.tolist()), rate=rate)
        for rate, kept in zip(rates, counts, strict=True)
    }
    with caplog.at_level("INFO", "cacp_ray"):
        build_winners(setup, best, tmp_path, build_here(setup))
    assert re.search(rf"repairing {len(rates)} {words}", caplog.text)
