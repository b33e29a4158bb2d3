"""Checks of native calls that go wrong in every way, for child processes to run."""

import ctypes

import torch

from cqlora.inference.checks import compare


def gives_wrong_numbers() -> None:
    matrix = torch.randn(96, 128)
    compare(lambda inputs: 1.1 * inputs.float() @ matrix.T, matrix)


def kills_its_process() -> None:
    ctypes.string_at(0)


def is_right() -> None:
    matrix = torch.randn(96, 128)
    compare(lambda inputs: inputs.float() @ matrix.T, matrix)
