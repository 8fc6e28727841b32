"""How many evaluators a cluster holds, and which share of a GPU each has."""

import pytest

from cacp_ray.distributed.nodes import Kind, Nodes, Room, find_room, find_share
from cacp_ray.evaluation.gpu import Need
from cacp_ray.workflows.evaluators import describe_needs


@pytest.mark.parametrize(
    ("cpus", "gpus", "share", "room"),
    [(8, 1, 0.25, 4), (2, 1, 0.25, 2), (16, 2, 0.6, 2), (16, 5, 0.4, 10), (8, 0, 0.5, 0)],
)
def test_a_share_is_never_across_two_gpus(cpus, gpus, share, room):
    nodes = Nodes({"a": cpus}, {"a": gpus}, frozenset())
    assert Kind(1, share).room(nodes, "a") == room
    assert Kind(1).room(nodes, "a") == cpus


def test_a_gpu_is_asked_for_where_a_cluster_has_none_yet():
    nodes = Nodes({"a": 4.0}, {"a": 0.0}, frozenset())
    room = find_room(nodes, {"CPU": 4.0}, 1, 0.25, None, 100)
    assert (room.on_gpus, room.on_cpus, room.device) == (1, 4, "cuda and cpu")


@pytest.mark.parametrize(
    ("share", "wanted", "useful", "expected"),
    [
        (0.5, None, 100, Room(0.5, 2, 1, 3, "cuda and cpu")),
        (0.25, None, 100, Room(0.25, 2, 1, 3, "cuda and cpu")),  # the CPUs end first
        (0.0, None, 100, Room(0.0, 0, 3, 3, "cpu")),
        (0.5, 7, 100, Room(0.5, 7, 0, 2, "cuda")),
        (0.5, None, 1, Room(0.5, 1, 0, 3, "cuda and cpu")),
    ],
)
def test_room_of_a_head_a_gpu_node_and_a_plain_one(share, wanted, useful, expected):
    cpus, gpus = {"head": 0.0, "gpu": 2.0, "plain": 1.0}, {"head": 0.0, "gpu": 1.0, "plain": 0.0}
    nodes = Nodes(cpus, gpus, frozenset())
    assert find_room(nodes, {"CPU": 3.0, "GPU": 1.0}, 1, share, wanted, useful) == expected


@pytest.mark.parametrize(
    ("cpus", "gpus", "needs", "number"),
    [
        ([8], [1], [(3, 16)], 5),
        ([4], [1], [(3, 16)], 4),
        ([8], [2], [(1, 16)], 4),
        ([64], [1], [(1, 80)], 8),
        ([8], [1], [(20, 16)], 1),
        ([1], [4], [(1, 16)], 1),
        ([8, 16], [1, 1], [(3, 16), (3, 7)], 2),
    ],
)
def test_as_many_share_a_gpu_as_the_smallest_holds_and_has_cpus_for(cpus, gpus, needs, number):
    names = "ab"[: len(cpus)]
    has = [dict(zip(names, numbers, strict=True)) for numbers in (cpus, gpus)]
    nodes = Nodes(*has, frozenset())
    measured = {name: Need(*need) for name, need in zip(names, needs, strict=True)}
    share = find_share(measured, nodes, 1)
    assert share == pytest.approx(1 / number, abs=1e-4)
    assert find_share({}, nodes, 1) == 0.0
    fast = Kind(1, share)
    assert sum(fast.room(nodes, name) for name in names) >= min(number, *cpus)


@pytest.mark.parametrize("number", range(1, 9))
def test_ray_has_room_for_all_that_share_a_gpu(number):
    """Ray rounds shares to ten thousandths."""
    nodes = Nodes({"a": 8.0}, {"a": 1.0}, frozenset())
    share = find_share({"a": Need(1, number)}, nodes, 1)
    assert round(share * 10_000) * number <= 10_000
    assert Kind(1, share).room(nodes, "a") == number


def test_of_a_node_that_has_left_nothing_follows():
    share = find_share({"gone": Need(1, 4)}, Nodes({}, {}, frozenset()), 1)
    assert "on CPUs" in describe_needs([Need(1, 4)], share)
