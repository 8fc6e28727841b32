"""Candidates that are being measured, each subnet once."""

from cacp_ray.evaluation.measurement import Candidate, Subnet


class InFlight:
    """Candidates that the evaluators have, and those that repeat one of them meanwhile."""

    def __init__(self) -> None:
        """Starts empty."""
        self._submitted: dict[int, Subnet] = {}
        # The submitted candidate first, then those that wait for the same answer.
        self._waiting: dict[Subnet, list[Candidate]] = {}

    def __len__(self) -> int:
        """Candidates that the evaluators have."""
        return len(self._submitted)

    def add(self, candidate: Candidate) -> bool:
        """Takes a candidate; False where another one of its subnet has been submitted."""
        if candidate.subnet in self._waiting:
            self._waiting[candidate.subnet].append(candidate)
            return False
        self._waiting[candidate.subnet] = [candidate]
        self._submitted[candidate.index] = candidate.subnet
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
