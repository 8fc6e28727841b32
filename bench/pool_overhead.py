"""Driver time per candidate of the Ray pool: python bench/pool_overhead.py [ACTORS ...].

The evaluators only sleep, so the driver's processor time is the cost of dispatch and collection.
"""

import sys
import time

from cacp_ray.distributed import cluster
from cacp_ray.distributed.actors import RayActors
from cacp_ray.distributed.pool import RayEvaluatorPool
from cacp_ray.evaluation.measurement import Candidate, Measurement, ScoreFunction

SECONDS = 0.02
CANDIDATES = 400
KEEP_COUNTS = tuple(range(16, 48))


def make_sleeping(seconds: float) -> ScoreFunction:
    def score(candidate: Candidate) -> Measurement:
        time.sleep(seconds)
        return Measurement(index=candidate.index, score=0.9, images=5000, seconds=seconds)

    return score


def run(num_evaluators: int) -> None:
    pool = RayEvaluatorPool(
        RayActors(make_sleeping, {"seconds": SECONDS}),
        num_evaluators=num_evaluators,
        cpus_per_evaluator=0.125,
    )
    started = time.monotonic()
    while pool.num_alive < num_evaluators:
        pool.results(0.0)
        time.sleep(0.01)
    start_s = time.monotonic() - started
    submitted = collected = 0
    started, cpu_started = time.monotonic(), time.thread_time()
    while collected < CANDIDATES:
        while submitted < min(CANDIDATES, collected + pool.capacity):
            pool.submit(Candidate(0.5, KEEP_COUNTS, index=submitted))
            submitted += 1
        collected += len(pool.results(1.0))
    wall_s, cpu_s = time.monotonic() - started, time.thread_time() - cpu_started
    busy = CANDIDATES * SECONDS / (num_evaluators * wall_s)
    print(
        f"{num_evaluators} actors: up after {start_s:.1f} s, driver {1e3 * cpu_s / CANDIDATES:.2f} "
        f"ms a candidate, {CANDIDATES / wall_s:.0f} candidates/s, actors busy {100 * busy:.0f} %"
    )
    pool.close()


if __name__ == "__main__":
    cluster.connect("local", num_cpus=2)
    for count in [int(word) for word in sys.argv[1:]] or [2, 4, 8]:
        run(count)
    cluster.disconnect()
