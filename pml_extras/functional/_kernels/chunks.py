"""Helpers for results that are computed one chunk at a time."""

import torch
from torch import Tensor


def row_chunks(num_rows: int, row_size: int, max_numel: int) -> list[slice]:
    """Slices of all rows, each of at most ``max_numel`` numbers but at least one row.

    Without rows, there is one empty slice, so that results can always be concatenated.
    """
    size = max(1, max_numel // max(1, row_size))
    starts = range(0, max(num_rows, 1), size)
    return [slice(start, min(num_rows, start + size)) for start in starts]


class IndexBuffer:
    """Integers appended to one growing tensor.

    A list of many small tensors would fragment the memory between the large blocks: gigabytes for
    a batch of 32,768 samples.
    """

    def __init__(self, expected_length: int, device: torch.device) -> None:
        self._buffer = torch.empty(expected_length, dtype=torch.long, device=device)
        self._length = 0

    def append(self, indices: Tensor) -> None:
        end = self._length + len(indices)
        if end > len(self._buffer):
            self._buffer = torch.cat([self._buffer, self._buffer.new_empty(end)])
        self._buffer[self._length : end] = indices
        self._length = end

    def result(self) -> Tensor:
        return self._buffer[: self._length]
