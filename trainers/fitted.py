"""What every trainer hands back, whatever its family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

# Encoded rows to the trainer's own probabilities, by its own library: what the exported graph is checked against.
Predict = Callable[[dict[str, np.ndarray]], npt.NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """A trained model: the exported graph, the trainer's own predict, and what happened on the way.

    thresholds: per encoded array, {column of the array: the values that the model splits on}; empty without splits.
    """

    model: onnx.ModelProto
    predict: Predict
    history: tuple[Mapping[str, Any], ...]
    thresholds: Mapping[str, Mapping[int, npt.NDArray[np.float32]]] = field(default_factory=dict)
