"""What an evaluator pool tells Ray: shown by its dashboard and exported for Prometheus.

Only a Ray with its dashboard's packages (`ray[default]`) exports them, as `ray_cacp_...`;
elsewhere they go nowhere, at no cost. `rate(ray_cacp_measurements_total[1m])` is evaluations per
second.
"""

from collections.abc import Sequence

from ray.util.metrics import Counter, Gauge

from cacp_ray.evaluation.measurement import Measurement


class PoolMetrics:
    """Counters and gauges of one driver."""

    def __init__(self) -> None:
        self._measurements = Counter("cacp_measurements", "Candidates that were scored")
        self._failed = Counter("cacp_failed_measurements", "Candidates that were given up")
        self._waiting = Gauge("cacp_candidates_waiting", "Candidates that wait for an evaluator")
        self._scoring = Gauge("cacp_candidates_scoring", "Candidates that evaluators hold")
        self._alive = Gauge("cacp_evaluators_alive", "Evaluators that are ready to score")

    def count(self, measurements: Sequence[Measurement]) -> None:
        """Adds finished measurements."""
        for measurement in measurements:
            # One that fell behind in a race was scored as well.
            (self._failed if measurement.status == "failed" else self._measurements).inc()

    def show(self, *, waiting: int, scoring: int, alive: int) -> None:
        """Takes the state of the pool."""
        self._waiting.set(waiting)
        self._scoring.set(scoring)
        self._alive.set(alive)
