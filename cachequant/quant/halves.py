"""Even and odd samples: what is fitted on one half is judged on the other, which must not hold the same samples."""

from __future__ import annotations

import torch
from torch import Tensor


def even_and_odd(rows: int, samples: int | None = None, row: int = 0, first: int = 0) -> tuple[Tensor, Tensor]:
    """Places of the even and of the odd samples among the rows of a tensor: [n₀], [n₁].

    Args:
        rows: size of the tensor's first dimension.
        samples: in the batch that the tensor is of, whole or in part. Guidance doubles a batch: rows i and i + samples are
            of one sample. None: every row is a sample.
        row: place of the tensor's first row in the batch.
        first: number of the batch's first sample.
    """
    places = torch.arange(row, row + rows)
    odd = (first + (places if samples is None else places % samples)) % 2 == 1
    return (~odd).nonzero()[:, 0], odd.nonzero()[:, 0]
