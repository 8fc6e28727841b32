"""Candidates that are being measured, each subnet once."""

from cacp_ray.evaluation.measurement import Candidate, SubnetKey


class InFlight:
    """Candidates that the evaluators have, and repeats that wait for one of them."""

    def __init__(self) -> None:
        self._submitted: dict[int, SubnetKey] = {}
        # The submitted candidate first, then those that wait for the same answer.
        self._waiting: dict[SubnetKey, list[Candidate]] = {}

    def __len__(self) -> int:
        """Candidates that the evaluators have."""
        return len(self._submitted)

    def add(self, candidate: Candidate) -> bool:
        """Takes a candidate; False where another one of its subnet has been submitted."""
        if candidate.key in self._waiting:
            self._waiting[candidate.key].append(candidate)
            return False
        self._waiting[candidate.key] = [candidate]
        self._submitted[candidate.index] = candidate.key
        return True

    def finish(self, index: int) -> list[Candidate]:
        """All that a measurement answers, the submitted candidate first.

        Empty for a second answer: a candidate that was given up for lost and submitted again.
        """
        subnet = self._submitted.pop(index, None)
        return [] if subnet is None else self._waiting.pop(subnet)

    @property
    def candidates(self) -> list[Candidate]:
        """All of them."""
        return [candidate for group in self._waiting.values() for candidate in group]
