"""DeepFM, cut where a request is: each side is reduced by itself, and only small sums cross over.

A request's side is computed once (one row) and added to every candidate: the first-order term, the FM's sums and the
first layer of the MLP are all sums over fields, so a sum per side is all that the other side needs.

Source: Guo et al., DeepFM, IJCAI 2017; the FM's pairwise sum in linear time is Rendle, ICDM 2010, lemma 3.1.

Shapes: B rows, F id fields of a side, L longest list, W value columns of a side, D embedding width, H first layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from plait.encoders import EncoderSet, Field
from plait.encoders.specs import Side
from trainers.config import DeepFMTraining
from trainers.neural.table import EmbeddingTable

# (first-order (B, 1), sum of embeddings (B, D), sum of their squares (B, D), first layer before its activation (B, H))
SideSums = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class SideLayout:
    """The encoded arrays of one side: `inputs` in graph order, and where ids lie in the concatenated table."""

    side: Side
    inputs: tuple[str, ...]
    ids: tuple[Field, ...]
    bags: tuple[Field, ...]
    id_offsets: tuple[int, ...]
    bag_offsets: tuple[int, ...]
    value_width: int

    @classmethod
    def of(cls, side: Side, encoders: EncoderSet) -> SideLayout:
        starts, total = {}, 0
        for name, size in encoders.table_sizes().items():
            starts[name] = total
            total += size
        ids, bags = encoders.side_fields(side, "id"), encoders.side_fields(side, "bag")
        return cls(
            side=side,
            inputs=tuple(name for name in encoders.input_names() if name.startswith(f"{side}_")),
            ids=ids,
            bags=bags,
            id_offsets=tuple(starts[field.table] for field in ids),
            bag_offsets=tuple(starts[field.table] for field in bags),
            value_width=encoders.value_width(side),
        )

    @property
    def n_fields(self) -> int:
        return len(self.ids) + len(self.bags)


class SideNet(nn.Module):
    """What one side of the model computes of its embedded fields and its values."""

    def __init__(self, layout: SideLayout, dim: int, hidden: int) -> None:
        super().__init__()
        self.layout, self.dim = layout, dim
        self.offsets: Tensor
        self.mask: Tensor | None
        width = layout.n_fields * dim + layout.value_width
        # one bias for the whole first layer: the candidate side's
        self.first = nn.Linear(width, hidden, bias=layout.side == "candidate") if hidden and width else None
        self.values = nn.Linear(layout.value_width, 1, bias=False) if layout.value_width else None
        self.register_buffer("offsets", torch.tensor(layout.id_offsets, dtype=torch.int64), persistent=False)
        self.register_buffer("mask", _dim_mask([*layout.ids, *layout.bags], dim), persistent=False)

    def lookups(self, arrays: dict[str, Tensor]) -> list[Tensor]:
        """The table rows to fetch: (B, F) for the ids, then (B, L) for each list."""
        side, found = self.layout.side, []
        if self.layout.ids:
            found.append(arrays[f"{side}_ids"] + self.offsets)
        for field, offset in zip(self.layout.bags, self.layout.bag_offsets, strict=True):
            found.append(arrays[f"{side}_bag_{field.name}"] + offset)
        return found

    def forward(self, embedded: Sequence[Tensor], arrays: dict[str, Tensor]) -> SideSums:
        """embedded: for each tensor of `lookups`, the table's rows: (B, F, 1 + D) and (B, L, 1 + D)."""
        side, left = self.layout.side, list(embedded)
        parts = [left.pop(0)] if self.layout.ids else []
        for field in self.layout.bags:
            parts.append(_pooled(left.pop(0), arrays[f"{side}_bag_{field.name}"], field.pool).unsqueeze(1))
        values = arrays[f"{side}_values"] if self.layout.value_width else None
        rows = parts[0] if parts else values.new_zeros(values.shape[0], 0, 1 + self.dim)  # type: ignore[union-attr]
        if len(parts) > 1:
            rows = torch.cat(parts, dim=1)
        embedding = rows[:, :, 1:]
        if self.mask is not None:
            embedding = embedding * self.mask
        first_order = rows[:, :, 0].sum(dim=1, keepdim=True)
        flat = embedding.flatten(1)
        if values is not None:
            first_order = first_order + self.values(values)  # type: ignore[misc]
            flat = torch.cat([flat, values], dim=1)
        hidden = self.first(flat) if self.first is not None else flat[:, :0]
        return first_order, embedding.sum(dim=1), embedding.square().sum(dim=1), hidden


class DeepFM(nn.Module):
    """Click logits from the encoded arrays of both sides."""

    def __init__(self, encoders: EncoderSet, spec: DeepFMTraining, *, generator: torch.Generator) -> None:
        super().__init__()
        self.table = EmbeddingTable(sum(encoders.table_sizes().values()), spec.dim, generator=generator)
        hidden = spec.hidden[0] if spec.hidden else 0
        sides: tuple[Side, Side] = ("request", "candidate")
        self.sides = nn.ModuleDict(
            {
                layout.side: SideNet(layout, spec.dim, hidden)
                for layout in (SideLayout.of(side, encoders) for side in sides)
                if layout.inputs
            }
        )
        self.bias = nn.Parameter(torch.zeros(1))
        self.head = _head(spec.hidden, spec.dropout)

    def combine(self, sides: Sequence[SideSums]) -> Tensor:
        """(B,) logits from the sums of the sides; their rows must be equally many."""
        first_order, total, squares, hidden = (sum_of(parts) for parts in zip(*sides, strict=True))
        pairs = 0.5 * (total.square() - squares).sum(dim=1, keepdim=True)
        logits = self.bias + first_order + pairs
        if self.head is not None:
            logits = logits + self.head(hidden)
        return logits.squeeze(1)

    def forward(self, arrays: dict[str, Tensor]) -> Tensor:
        """(B,) logits, reading the table itself (no gradient reaches it)."""
        return self.combine([self.side(name, arrays) for name in self.sides])

    def side(self, name: str, arrays: dict[str, Tensor]) -> SideSums:
        net = self.sides[name]
        sums: SideSums = net([self.table(ids) for ids in net.lookups(arrays)], arrays)  # type: ignore[operator]
        return sums


def sum_of(parts: Sequence[Tensor]) -> Tensor:
    """One or two tensors, added."""
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _pooled(rows: Tensor, ids: Tensor, pool: str) -> Tensor:
    """(B, 1 + D) sum or mean over a list's rows (B, L, 1 + D); padding (id 0) is left out, an empty list gives 0."""
    present = (ids > 0).to(rows.dtype).unsqueeze(2)
    total = (rows * present).sum(dim=1)
    return total if pool == "sum" else total / present.sum(dim=1).clamp(min=1.0)


def _dim_mask(fields: Sequence[Field], dim: int) -> Tensor | None:
    """(fields, D) ones where a field uses that component; None if all use all."""
    if all(field.dim is None or field.dim >= dim for field in fields):
        return None
    return torch.tensor([[1.0 if field.dim is None or i < field.dim else 0.0 for i in range(dim)] for field in fields])


def _head(hidden: Sequence[int], dropout: float) -> nn.Sequential | None:
    if not hidden:
        return None
    layers: list[nn.Module] = [nn.ReLU(), nn.Dropout(dropout)]
    for width, following in pairwise(hidden):
        layers += [nn.Linear(width, following), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], 1, bias=False))
