"""The conditional agent: what it learns, proposes, answers, and continues after a kill."""

import dataclasses
from collections import defaultdict

import numpy as np
import pytest
import torch

from cacp_ray.agent.cacp.agent import CACP, MAX_UPDATES_A_STEP
from cacp_ray.agent.cacp.critics import NUM_CRITICS, Critics
from cacp_ray.agent.cacp.replay import LOG_RATIOS, VALUES, WEIGHTS
from cacp_ray.errors import ArtifactError
from cacp_ray.searching.budget import spend
from cacp_ray.searching.settings import AgentSettings
from tests.toy import five_group_problem, toy_problem
from tests.toy import measure_by_formula as measure

RATES = (0.3, 0.5, 0.7)
UNSEEN = (0.4, 0.6)
SMALL = AgentSettings(hidden=(48, 48), batch_size=64)


def build(mdp, settings=SMALL, seed=0) -> CACP:
    return CACP(settings, mdp.space, RATES, seed)


def drive(agent, score, episodes, batch=6) -> dict[float, float]:
    """Asks, tells and updates; returns the best score of each rate."""
    best = dict.fromkeys(RATES, 0.0)
    for first in range(0, episodes, batch):
        results = measure(agent.ask(min(batch, episodes - first)), score, first)
        for candidate, measurement in results:
            best[candidate.rate] = max(best[candidate.rate], measurement.score)
        agent.tell(results)
        while agent.pending_updates and agent.learn()["updates"]:
            pass
    return best


def optimum(mdp, score, rate) -> float:
    """The best score of a long local search."""
    rng = np.random.default_rng(0)
    counts = mdp.prior([rate])[0]
    best = score(tuple(counts))
    for _ in range(150):
        desired = np.tile(counts, (32, 1)) * np.where(
            rng.random((32, len(counts))) < 0.3, rng.lognormal(0, 0.3, (32, len(counts))), 1.0
        )
        desired *= rng.uniform(0.93, 1, (32, 1))
        for row in spend(mdp.budget, desired, np.full(32, rate)):
            if score(tuple(row)) > best:
                best, counts = score(tuple(row)), row
    return best


@pytest.mark.parametrize(
    ("seed", "episodes"),
    [(0, 90), *(pytest.param(seed, 150, marks=pytest.mark.slow) for seed in range(3))],
)
def test_the_policy_reaches_99_percent_of_the_optimum_within_150_episodes(seed, episodes):
    """Five groups of at most nine legal counts: the optimum is known from trying them all."""
    mdp, score, optima = five_group_problem(seed, RATES)
    agent = build(mdp, seed=seed)
    best = np.array(list(drive(agent, score, episodes).values()))
    policy = np.array([score(tuple(row)) for row in agent.policy(RATES)])
    prior = np.array([score(tuple(row)) for row in mdp.prior(RATES)])
    assert (best >= 0.999 * optima).all()
    assert (policy >= 0.99 * optima).all()
    assert (prior < 0.997 * optima).all()
    assert prior.mean() < 0.97 * optima.mean()  # there is something to learn


@pytest.mark.slow
def test_learning_and_not_its_elites_alone_reaches_99_percent():
    """The control takes no gradient step: noise around its best so far and their mean."""
    rows: dict[str, list[float]] = defaultdict(list)
    idle = dataclasses.replace(SMALL, updates_per_episode=0, drafts=1)
    for seed in range(2):
        mdp, score = toy_problem(seed)
        agent, control = build(mdp, seed=seed), build(mdp, idle, seed=seed)
        rows["best"] += drive(agent, score, 120).values()
        rows["best without"] += drive(control, score, 120).values()
        rows["optimum"] += [optimum(mdp, score, rate) for rate in RATES]
        for name, counts in {
            "prior": mdp.prior(RATES),
            "policy": agent.policy(RATES),
            "policy without": control.policy(RATES),
            "prior, unseen": mdp.prior(UNSEEN),
            "policy, unseen": agent.policy(UNSEEN),
        }.items():
            rows[name] += [score(tuple(row)) for row in counts]
    mean = {name: float(np.mean(scores)) for name, scores in rows.items()}
    missing = mean["optimum"] - mean["prior"]
    assert mean["policy"] > max(0.99 * mean["optimum"], mean["policy without"] + 0.05 * missing)
    assert mean["best"] > mean["best without"] + 0.05 * missing
    assert mean["policy, unseen"] > mean["prior, unseen"] + 0.4 * missing
    by_rate = np.reshape(rows["policy"], (-1, 3)).mean(0) - np.reshape(rows["prior"], (-1, 3)).mean(
        0
    )
    assert (by_rate > 0).all()


def test_without_learning_the_policy_is_the_mean_of_good_allocations():
    mdp, score = toy_problem(0)
    agent = build(mdp, dataclasses.replace(SMALL, updates_per_episode=0))
    drive(agent, score, 60)
    mean = mdp.space.decode(RATES, agent._behaviour.between(np.array(RATES)))
    np.testing.assert_array_equal(agent.policy(RATES), mean)
    assert (mean != mdp.prior(RATES)).any(axis=1).all()


def test_an_untrained_policy_is_the_prior_and_asked_first():
    mdp, _ = toy_problem(0)
    agent = build(mdp)
    rates = np.linspace(0.2, 0.9, 8)
    np.testing.assert_array_equal(agent.policy(rates), mdp.prior(rates))
    first = agent.ask(3)
    assert [proposal.rate for proposal in first] == list(RATES)
    for proposal in first:
        assert proposal.keep_counts == tuple(mdp.prior([proposal.rate])[0])


def test_proposals_are_distinct_and_within_budget():
    mdp, score = toy_problem(1)
    agent = build(mdp, AgentSettings(hidden=(32,), updates_per_episode=1))
    asked = []
    for _ in range(12):
        proposals = agent.ask(7)
        agent.tell(measure(proposals, score, len(asked)))
        asked += [(proposal.rate, proposal.keep_counts) for proposal in proposals]
    assert len(set(asked)) == len(asked)
    costs = mdp.budget.cost([counts for _, counts in asked])
    assert (costs <= mdp.budget.limit([rate for rate, _ in asked])).all()
    per_rate = [sum(rate == wanted for rate, _ in asked) for wanted in RATES]
    assert max(per_rate) - min(per_rate) <= 1


def test_a_restored_agent_continues_bit_for_bit(tmp_path):
    mdp, score = toy_problem(2)
    few = AgentSettings(hidden=(32,), batch_size=32, updates_per_episode=4)
    agent = build(mdp, few)
    drive(agent, score, 36)
    agent.tell(measure(agent.ask(6), score, 36))  # updates are pending when it is saved
    agent.save(tmp_path)
    assert not any(file.suffix in (".pkl", ".pt") for file in tmp_path.rglob("*"))

    other = build(mdp, few, seed=9)
    other.restore(tmp_path)
    assert other.pending_updates == agent.pending_updates > 0
    for twin in (agent, other):
        twin.update(10)
        drive(twin, score, 18)
    assert agent.ask(12) == other.ask(12)
    rates = np.linspace(0.2, 0.9, 15)
    np.testing.assert_array_equal(agent.policy(rates), other.policy(rates))
    ours, theirs = agent._critics.state_dict(), other._critics.state_dict()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name])


def test_networks_and_measurements_alone_give_the_same_answers(tmp_path):
    mdp, score = toy_problem(2)
    agent, told = build(mdp), []
    for first in range(0, 48, 6):
        told += measure(agent.ask(6), score, first)
        agent.tell(told[-6:])
        agent.learn()
    agent.save(tmp_path)
    reader = build(mdp, seed=5)
    reader.tell(told)
    reader.load_policy(tmp_path / "policy.safetensors")
    np.testing.assert_array_equal(agent.policy(UNSEEN), reader.policy(UNSEEN))


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    mdp, _ = toy_problem(0)
    (tmp_path / "algorithm_state.pkl").touch()
    with pytest.raises(ArtifactError, match=r"no state\.json, as an earlier cacp_ray"):
        build(mdp).restore(tmp_path)


def test_learning_takes_the_earned_steps_and_reports_plain_figures():
    mdp, score = toy_problem(0)
    agent = build(mdp, AgentSettings(hidden=(32,), updates_per_episode=2))
    assert agent.learn() == {"updates": 0}
    for told in (0, 30):
        agent.tell(measure(agent.ask(30), score, told))
        figures = agent.learn()
        assert figures.keys() == {"updates", "critic_loss"}
        assert all(type(value) is float for value in figures.values())
        assert figures["updates"] == 2 * (told + 30)
    assert agent.learn() == {"updates": 120}
    assert agent.pending_updates == 0


def test_steps_are_those_of_torch_s_adam():
    critics, torchs = Critics(5, (8,), 1e-3, 0), Critics(5, (8,), 1e-3, 0)
    optimizer = torch.optim.Adam(torchs.parameters(), lr=1e-3)
    rng = np.random.default_rng(0)
    for _ in range(4):
        rows = {
            LOG_RATIOS: rng.standard_normal((12, 5)).astype(np.float32),
            VALUES: rng.standard_normal(12).astype(np.float32),
            WEIGHTS: rng.random(12).astype(np.float32),
        }
        critics.step(rows)
        x, y, w = (torch.from_numpy(rows[name]) for name in (LOG_RATIOS, VALUES, WEIGHTS))
        own = torch.stack([torchs.values(x)[n % NUM_CRITICS, n] for n in range(12)])
        optimizer.zero_grad()
        (NUM_CRITICS * (w * (own - y) ** 2).mean()).backward()
        optimizer.step()
    for ours, theirs in zip(critics.parameters(), torchs.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-7)


def test_learning_thins_out_when_many_results_come_at_once():
    mdp, score = toy_problem(0)
    agent = build(mdp, AgentSettings(hidden=(8,), batch_size=8))
    agent.tell(measure(agent.ask(40), score))
    assert agent.learn()["updates"] == MAX_UPDATES_A_STEP < 40 * 16
    assert agent.pending_updates == 0


def test_the_first_episodes_teach_the_critics_nothing():
    mdp, score = toy_problem(0)
    agent = build(mdp)
    drive(agent, score, 24)
    mean = mdp.space.decode(UNSEEN, agent._behaviour.between(UNSEEN))
    np.testing.assert_array_equal(agent.policy(UNSEEN), mean)
    drive(agent, score, 12)
    assert (agent.policy(UNSEEN) != mean).any()


def test_good_allocations_are_interpolated_between_rates():
    mdp, score = toy_problem(0)
    agent = build(mdp)
    drive(agent, score, 30)
    known = agent._behaviour.between(RATES)
    for rate, offsets in zip(RATES, known, strict=True):
        best = [elite.offsets for elite in agent._behaviour.elites[rate][:5]]
        np.testing.assert_allclose(offsets, np.mean(best, axis=0), atol=1e-6)
    offsets = agent._behaviour.between([0.2, 0.35, 0.9])
    np.testing.assert_allclose(offsets[0], known[0])
    np.testing.assert_allclose(offsets[1], 0.75 * known[0] + 0.25 * known[1], atol=1e-6)
    np.testing.assert_allclose(offsets[2], known[2])


def test_failures_teach_but_are_no_elites():
    mdp, score = toy_problem(0)
    agent = build(mdp)
    agent.tell(measure(agent.ask(6), score))
    before = dict(agent._behaviour.elites)
    failed = measure(agent.ask(6), score, 6, status="failed")
    agent.tell(failed)
    agent.tell(failed)  # told twice, stored once
    assert len(agent._replay) == 12
    assert {rate: list(elites) for rate, elites in before.items()} == agent._behaviour.elites
    assert agent._replay.values().min() == -4
    assert np.abs(agent._replay.values()[:6]).max() < 3


def test_failures_alone_leave_the_policy_at_the_prior():
    mdp, score = toy_problem(0)
    agent = build(mdp, AgentSettings(hidden=(8,), updates_per_episode=0))
    agent.tell(measure(agent.ask(40), score, status="failed"))
    np.testing.assert_array_equal(agent.policy(UNSEEN), mdp.prior(UNSEEN))


def test_samples_start_with_the_policy_and_go_on_around_a_beam():
    mdp, _ = toy_problem(0)
    agent = build(mdp)
    samples = agent.policy_samples(0.42, 20, np.random.default_rng(0))
    assert len(set(samples)) == len(samples) == 20
    assert samples[0] == tuple(agent.policy([0.42])[0])
    assert (mdp.budget.cost(samples) <= mdp.budget.limit([0.42])).all()

    far = tuple(mdp.space.decode([0.42], np.linspace([-1.2], [1.2], 8).T)[0])
    rng = np.random.default_rng(0)
    near = agent.policy_samples(0.42, 20, rng, beam=[far], known=samples)
    assert not set(near) & set(samples)
    distances = np.abs(np.log(np.array(near) / far)).mean(axis=1)
    assert (distances > 0.2).sum() >= 3
    assert (distances < 0.2).sum() >= 3  # these lie around the policy
