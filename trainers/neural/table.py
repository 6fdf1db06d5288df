"""One embedding table for all fields, trained by exact row-wise Adagrad on the rows a batch touches.

Dense optimisers pay for every row at every step; this pays for the batch alone, whatever the vocabulary.

Shapes: T rows of the table, D embedding width, M look-ups of a batch, U distinct rows among them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class EmbeddingTable(nn.Module):
    """(T, 1 + D): column 0 of a row is the id's first-order weight, the others its embedding."""

    def __init__(self, rows: int, dim: int, *, generator: torch.Generator, deviation: float = 0.01) -> None:
        super().__init__()
        weight = torch.empty(rows, 1 + dim)
        weight.normal_(0.0, deviation, generator=generator)
        weight[:, 0] = 0.0
        self.register_buffer("weight", weight)
        self.weight: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self.weight)


class TouchedRows:
    """The distinct rows of one batch as a leaf of autograd's graph, so that gradients are summed by row."""

    def __init__(self, table: EmbeddingTable, ids_M: Tensor) -> None:
        self.ids_U, self._inverse_M = torch.unique(ids_M, return_inverse=True)
        self.rows_U = table.weight.index_select(0, self.ids_U).requires_grad_()

    def embed(self) -> Tensor:
        """(M, 1 + D) rows in look-up order; the gradient that reaches `rows_U` is summed over equal ids."""
        return functional.embedding(self._inverse_M, self.rows_U)


class RowWiseAdagrad:
    """Adagrad with one accumulator per row (two: the first-order weight has its own), stepping touched rows only.

    An accumulator grows by the mean square of the row's summed gradient. Source: Duchi, Hazan and Singer, JMLR 12,
    2011; one number per row as in Naumov et al., DLRM, arXiv:1906.00091, and fbgemm's EXACT_ROWWISE_ADAGRAD.
    """

    def __init__(self, table: EmbeddingTable, *, learning_rate: float, l2: float = 0.0, epsilon: float = 1e-10) -> None:
        self.table, self.learning_rate, self.l2, self.epsilon = table, learning_rate, l2, epsilon
        self.state = torch.zeros(len(table.weight), 2)

    @torch.no_grad()
    def step(self, touched: TouchedRows) -> None:
        """Move the touched rows against their gradient; raises RuntimeError if backward has not run."""
        gradient = touched.rows_U.grad
        if gradient is None:
            raise RuntimeError("the touched rows have no gradient; call backward first")
        rows = touched.rows_U.detach()
        if self.l2:
            gradient = gradient.add(rows, alpha=self.l2)
        squares = torch.stack([gradient[:, 0].square(), gradient[:, 1:].square().mean(dim=1)], dim=1)
        state = self.state.index_select(0, touched.ids_U).add_(squares)
        self.state.index_copy_(0, touched.ids_U, state)
        rate = state.sqrt_().add_(self.epsilon).reciprocal_().mul_(-self.learning_rate)
        step = torch.cat([gradient[:, :1] * rate[:, :1], gradient[:, 1:] * rate[:, 1:]], dim=1)
        self.table.weight.index_copy_(0, touched.ids_U, rows + step)
