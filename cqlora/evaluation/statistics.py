"""Means and ratios with the standard errors that they have over documents."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Estimate(NamedTuple):
    """A number and how sure it is."""

    value: float
    error: float | None
    """Standard error; None where a single document says nothing of it."""


def ratio(numerators: ArrayLike, denominators: ArrayLike) -> Estimate:
    """The sum of `numerators` over the sum of `denominators`, each (documents,).

    The error is that of the ratio estimator with documents as clusters (Cochran, Sampling Techniques, 6.4), without
    correction for a finite population: tokens of one document are as alike as they are, documents are drawn apart.
    """
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    value = float(above.sum() / below.sum())
    count = len(above)
    if count < 2:
        return Estimate(value, None)
    residuals = above - value * below
    return Estimate(value, math.sqrt(count / (count - 1) * float(residuals @ residuals)) / float(below.sum()))


def mean(values: ArrayLike) -> Estimate:
    """The mean of independent `values`, (n,), and its standard error."""
    numbers = np.asarray(values, dtype=np.float64)
    return ratio(numbers, np.ones_like(numbers))
