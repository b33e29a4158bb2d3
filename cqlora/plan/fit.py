"""Whether an estimate fits into the memory that there is."""

from enum import Enum

from cqlora.plan.estimate import Estimate

PRESSED_FRAGMENT_SHARE = 0.1
"""What fragments take at least: an allocator that runs short of memory gives back what it has cached."""

MARGIN = 0.85
"""Share of a device up to which a run fits beyond doubt: the plan may be 15% off."""


class Fit(Enum):
    """How a run stands to its machine."""

    fits = "fits"
    tight = "tight"
    does_not_fit = "does not fit"


def judge_fit(worker: Estimate, capacity: float | None) -> Fit:
    """Whether one worker fits into `capacity` bytes; an unknown capacity is no reason to refuse."""
    if capacity is None or worker.peak <= MARGIN * capacity:
        return Fit.fits
    return Fit.tight if least_bytes(worker) <= capacity else Fit.does_not_fit


def least_bytes(worker: Estimate) -> float:
    """The peak when the allocator is pressed to give back all that it can."""
    pressed = worker.allocated + PRESSED_FRAGMENT_SHARE * worker.passing + worker.context
    return min(worker.peak, max(pressed, worker.save))


def squeeze(size: float, worker: Estimate, capacity: float | None) -> float:
    """`size`, a peak of `worker`, with the allocator's losses squeezed into `capacity` where that can be."""
    return size if capacity is None or size <= capacity else max(capacity, min(size, least_bytes(worker)))
