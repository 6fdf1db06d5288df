"""The embedding table's update is Adagrad by the book on touched rows, and DeepFM is its formula."""

from __future__ import annotations

import numpy as np
import pytest

import trainers.neural  # noqa: F401 - sets OpenMP's policy before torch starts its threads

import torch  # isort: skip

from plait.encoders import EncoderSet
from trainers.config import DeepFMTraining
from trainers.neural.deepfm import DeepFM
from trainers.neural.table import EmbeddingTable, RowWiseAdagrad, TouchedRows
from trainers.pipeline import model_inputs


@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_touched_rows_step_as_a_loop_over_rows_would(l2):
    generator = torch.Generator().manual_seed(0)
    table = EmbeddingTable(12, 3, generator=generator)
    optimizer = RowWiseAdagrad(table, learning_rate=0.1, l2=l2)
    weight = table.weight.double().numpy().copy()
    state = np.zeros((12, 2))
    for step in range(4):
        ids = torch.randint(0, 12, (9,), generator=generator)
        target = torch.randn(9, 4, generator=generator)
        touched = TouchedRows(table, ids)
        ((touched.embed() - target) ** 2).sum().backward()
        optimizer.step(touched)

        gradient = np.zeros_like(weight)
        for i, row in enumerate(ids.tolist()):
            gradient[row] += 2 * (weight[row] - target[i].numpy())
        for row in set(ids.tolist()):
            g = gradient[row] + l2 * weight[row]
            state[row] += [g[0] ** 2, np.mean(g[1:] ** 2)]
            weight[row, 0] -= 0.1 * g[0] / np.sqrt(state[row, 0])
            weight[row, 1:] -= 0.1 * g[1:] / np.sqrt(state[row, 1])
        np.testing.assert_allclose(table.weight.numpy(), weight, atol=1e-5, err_msg=f"step {step}")
        np.testing.assert_allclose(optimizer.state.numpy(), state, rtol=1e-4)


def test_rows_that_a_batch_does_not_touch_stay_as_they_are():
    table = EmbeddingTable(1000, 4, generator=torch.Generator().manual_seed(0))
    before = table.weight.clone()
    touched = TouchedRows(table, torch.tensor([3, 3, 7]))
    touched.embed().sum().backward()
    RowWiseAdagrad(table, learning_rate=0.1, l2=0.5).step(touched)
    changed = (table.weight != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == [3, 7]


def test_a_step_before_backward_is_refused():
    table = EmbeddingTable(10, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match="call backward first"):
        RowWiseAdagrad(table, learning_rate=0.1).step(TouchedRows(table, torch.tensor([1])))


def a_model(service, rows, *, dims: dict[str, int]) -> tuple[DeepFM, EncoderSet]:
    from plait.encoders import Bag, Drop, Hash, Scale, Vocabulary

    inputs, _ = model_inputs(service, rows.schema)
    encodings = dict.fromkeys((item.name for item in inputs), Drop())
    encodings |= {
        "user_id": Vocabulary(),
        "history": Bag(share="item_id", last=3),
        "gender": Hash(buckets=5, dim=dims.get("gender")),
        "item_id": Vocabulary(),
        "genres": Bag(pool="sum"),
        "movie_rate": Scale(),
    }
    encoders = EncoderSet.fit(rows, inputs, encodings)
    spec = DeepFMTraining(dim=4, hidden=(6, 3), dropout=0.5)
    torch.manual_seed(1)
    model = DeepFM(encoders, spec, generator=torch.Generator().manual_seed(1)).eval()
    model.table.weight.normal_(generator=torch.Generator().manual_seed(2))
    return model, encoders


def test_deepfm_is_first_order_plus_all_pairs_plus_mlp(service, make_clicks):
    """Against a loop over fields and pairs, with lists pooled by hand and a field of fewer dimensions."""
    rows = make_clicks(50, 1)
    model, encoders = a_model(service, rows, dims={"gender": 2})
    arrays = encoders.encode_rows(rows)
    got = model({name: torch.from_numpy(array) for name, array in arrays.items()}).detach().numpy()
    starts, total = {}, 0
    for name, size in encoders.table_sizes().items():
        starts[name], total = total, total + size
    table = model.table.weight.numpy()
    for i in range(0, 50, 7):
        first, vectors = float(model.bias.detach()[0]), {"request": [], "candidate": []}
        hidden = np.zeros(6)
        for side in ("request", "candidate"):
            for field in (*encoders.side_fields(side, "id"), *encoders.side_fields(side, "bag")):
                if field.kind == "id":
                    row = table[starts[field.table] + arrays[f"{side}_ids"][i, field.position]]
                else:
                    ids = [j for j in arrays[f"{side}_bag_{field.name}"][i] if j > 0]
                    row = sum((table[starts[field.table] + j] for j in ids), np.zeros(5))
                    row = row / max(len(ids), 1) if field.pool == "mean" else row
                first += row[0]
                vector = row[1:].copy()
                vector[field.dim or 4 :] = 0.0
                vectors[side].append(vector)
            net = model.sides[side]
            values = arrays.get(f"{side}_values", np.zeros((50, 0), np.float32))[i]
            if net.values is not None:
                first += float(net.values.weight.detach().numpy()[0] @ values)
            flat = np.concatenate([*vectors[side], values])
            hidden += net.first.weight.detach().numpy() @ flat
            if net.first.bias is not None:
                hidden += net.first.bias.detach().numpy()
        every = vectors["request"] + vectors["candidate"]
        pairs = sum(every[a] @ every[b] for a in range(len(every)) for b in range(a))
        deep = float(model.head(torch.from_numpy(hidden.astype(np.float32))).detach()[0])
        assert got[i] == pytest.approx(first + pairs + deep, rel=1e-4, abs=1e-4)


def test_shared_lists_are_looked_up_in_the_owners_rows(service, make_clicks):
    model, encoders = a_model(service, make_clicks(50, 1), dims={})
    assert len(model.table.weight) == sum(encoders.table_sizes().values())
    owner = next(net.layout for net in model.sides.values() if net.layout.side == "candidate")
    reader = next(net.layout for net in model.sides.values() if net.layout.side == "request")
    position = [field.name for field in owner.ids].index("item_id")
    assert reader.bag_offsets == (owner.id_offsets[position],)
