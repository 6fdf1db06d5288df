"""Artifacts: one trained model as a folder that serving can load without the trainer, torch or any of its libraries.

    model.onnx (+ model.onnx.data when large)   encoded arrays → click probability, `score` (N,)
    encoders/                                    columns → encoded arrays
    manifest.json                                what it is: service, columns, transforms, metrics, lineage, checksums
    golden.arrow                                 rows and the scores that the trainer itself gives them

A folder is written aside, fsynced and renamed, so a half-written one never has its final name; it is loaded only if
its files have their checksums and its graph reproduces the golden scores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pyarrow as pa
import pyarrow.ipc

from plait.encoders import EncoderSet
from plait.errors import ArtifactError, DataError
from plait.files import atomic_folder

if TYPE_CHECKING:
    import onnx

FORMAT = 1
GOLDEN_SCORE = "golden_score"
GOLDEN_TOLERANCE = 1e-5
OUTPUT = "score"
# Tables above this size go beside the graph, where onnxruntime maps them and all workers share the pages.
EXTERNAL_DATA_BYTES = 16 << 20
_OIP_TYPES = {"tensor(float)": "FP32", "tensor(int64)": "INT64"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactManifest:
    """What an artifact is and where it came from; manifest.json holds these fields.

    features: [{name, dtype, side, key}] that the encoders read, join keys included (`key` true).
    transforms: {import reference: sha256} of the on-demand views behind them. versions: {library: version}.
    data_hash: content hash of the training set; `dataset` its folder's name below the home's datasets/.
    files: {relative path: sha256}, filled in by `write_artifact`.
    """

    name: str
    algorithm: str
    feature_service: str
    features: tuple[Mapping[str, Any], ...]
    label: str
    transforms: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    baselines: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()
    data_hash: str = ""
    dataset: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path) -> ArtifactManifest:
        """The manifest of the artifact in `folder`. Raises ArtifactError if there is none that this Plait reads."""
        path = folder / "manifest.json"
        try:
            content = json.loads(path.read_text())
            known = {item.name for item in fields(cls)}
            if content["format"] != FORMAT:
                raise ArtifactError(f"{folder} is an artifact of format {content['format']}; this Plait reads {FORMAT}")
            lists = {key: tuple(content[key]) for key in ("features", "history")}
            return cls(**{**{key: value for key, value in content.items() if key in known}, **lists})
        except FileNotFoundError as error:
            raise ArtifactError(
                f"{folder} is no artifact: it has no manifest.json (half-written, or not one)"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path} cannot be read: {error!r}") from error


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One input or output as the Open Inference Protocol describes it; -1 in `shape` is a free dimension."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class Artifact:
    """A loaded model: raw columns or encoded arrays in, click probabilities out. Safe to call from many threads."""

    def __init__(
        self, folder: Path, manifest: ArtifactManifest, encoders: EncoderSet, session: ort.InferenceSession
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.encoders = encoders
        self.session = session
        self.inputs = tuple(_tensor_info(item) for item in session.get_inputs())
        self.outputs = tuple(_tensor_info(item) for item in session.get_outputs())
        self.request_columns = tuple(item.name for item in encoders.inputs if item.side == "request")
        self.candidate_columns = tuple(item.name for item in encoders.inputs if item.side == "candidate")

    def score(self, request: pa.Table, candidates: pa.Table) -> npt.NDArray[np.float32]:
        """Click probability of each candidate, shape (N,).

        request: `request_columns`, 1 row (expanded inside the graph) or N. candidates: `candidate_columns`, N rows.
        Both lists hold the join keys user_id and item_id where the model reads them; other columns are ignored.
        Raises DataError if a column is missing or of another type.
        """
        if len(candidates) == 0:
            return np.empty(0, np.float32)
        return self._run(self.encoders.encode(request, candidates))

    def score_rows(self, rows: pa.Table) -> npt.NDArray[np.float32]:
        """Click probability of each row of a table that holds the columns of both sides."""
        return self.score(rows, rows)

    def infer(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The graph alone: encoded arrays, one per entry of `inputs`, to {"score": (N,)}.

        Raises DataError if an array is missing, unknown, or not of the shape and type that `inputs` says.
        """
        feed = {info.name: self._checked(info, arrays) for info in self.inputs}
        if unknown := sorted(set(arrays) - set(feed)):
            raise DataError(f"unknown input {unknown[0]!r}; this model has {', '.join(feed)}")
        try:
            return {OUTPUT: self._run(feed)}
        except Exception as error:  # onnxruntime raises its own types, which only name nodes of the graph
            raise DataError(f"the inputs do not go together: {error}") from error

    def _checked(self, info: TensorInfo, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        if info.name not in arrays:
            raise DataError(
                f"input {info.name!r} is missing; this model needs {', '.join(i.name for i in self.inputs)}"
            )
        array = np.asarray(arrays[info.name])
        wanted = np.int64 if info.datatype == "INT64" else np.float32
        fits = array.ndim == len(info.shape) and all(
            want in (-1, have) for want, have in zip(info.shape, array.shape, strict=False)
        )
        if not fits or array.dtype.kind not in ("iu" if wanted is np.int64 else "iuf"):
            raise DataError(
                f"input {info.name!r} is {array.dtype} of shape {list(array.shape)}; "
                f"it must be {info.datatype} of shape {list(info.shape)} (-1: any)"
            )
        if wanted is np.int64 and array.size and (array.min() < 0 or array.max() >= self._id_limit(info.name)):
            raise DataError(f"input {info.name!r} holds ids outside [0, {self._id_limit(info.name)})")
        return np.ascontiguousarray(array, wanted)

    def _id_limit(self, name: str) -> int:
        """The least number of rows among the id tables that one input indexes."""
        side, _, rest = name.partition("_")
        sizes = self.encoders.table_sizes()
        kind, wanted = ("id", None) if rest == "ids" else ("bag", rest.removeprefix("bag_"))
        return min(
            sizes[f.table]
            for f in self.encoders.fields
            if (f.side, f.kind) == (side, kind) and wanted in (None, f.name)
        )

    def _run(self, arrays: Mapping[str, np.ndarray]) -> npt.NDArray[np.float32]:
        scores: npt.NDArray[np.float32] = self.session.run([OUTPUT], arrays)[0]
        return scores

    def verify(self) -> float:
        """Largest difference between the golden scores and this graph's, over whole tables and over single rows.

        Raises ArtifactError if it is above 1e-5.
        """
        golden = read_golden(self.folder)
        expected = golden.column(GOLDEN_SCORE).to_numpy()
        try:
            worst = _largest_difference(self.score_rows(golden), expected)
            # the served form: one request row, expanded inside the graph
            first = self.score(golden.slice(0, 1), golden.slice(0, 1))
        except DataError as error:
            raise ArtifactError(f"{self.folder}: the golden rows cannot be scored: {error}") from error
        worst = max(worst, _largest_difference(first, expected[:1]))
        if not worst <= GOLDEN_TOLERANCE:
            raise ArtifactError(
                f"{self.folder} does not reproduce its {len(golden)} golden rows: scores differ by up to {worst:.2g}, "
                f"{GOLDEN_TOLERANCE:g} is allowed; train and publish it again"
            )
        return worst


def load_artifact(folder: Path, *, threads: int = 1, verify: bool = True) -> Artifact:
    """Load an artifact for scoring; onnxruntime uses `threads` threads.

    verify: check every file's checksum and reproduce the golden rows first.
    Raises ArtifactError, naming the folder and the fault, if the artifact is half-written, corrupt or disagrees.
    """
    manifest = ArtifactManifest.read(folder)
    if verify:
        _check_files(folder, manifest)
    encoders = EncoderSet.load(folder / "encoders")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a type per status, none of them public
        raise ArtifactError(f"{folder / 'model.onnx'} cannot be loaded: {error}") from error
    names = {item.name for item in session.get_inputs()}
    if names != set(encoders.input_names()):
        raise ArtifactError(
            f"{folder}: the graph reads {sorted(names)}, the encoders give {sorted(encoders.input_names())}"
        )
    artifact = Artifact(folder, manifest, encoders, session)
    if verify:
        artifact.verify()
    return artifact


def write_artifact(
    folder: Path, *, model: onnx.ModelProto, encoders: EncoderSet, manifest: ArtifactManifest, golden: pa.Table
) -> ArtifactManifest:
    """Write an artifact to `folder` (replaced if it exists) and return its manifest with the checksums.

    golden: raw rows with all columns of `encoders.inputs` and `golden_score`, the trainer's own answer for each row.
    Raises ArtifactError, and leaves nothing behind, if the graph does not reproduce them.
    """
    import onnx

    missing = {*(item.name for item in encoders.inputs), GOLDEN_SCORE} - set(golden.column_names)
    if missing or len(golden) == 0:
        raise ArtifactError(f"golden rows must hold every input and {GOLDEN_SCORE}; they lack {sorted(missing)}")
    with atomic_folder(folder) as aside:
        large = model.ByteSize() > EXTERNAL_DATA_BYTES
        onnx.save_model(
            model,
            str(aside / "model.onnx"),
            save_as_external_data=large,
            all_tensors_to_one_file=True,
            location="model.onnx.data",
            size_threshold=1 << 16,
        )
        encoders.save(aside / "encoders")
        with pa.ipc.new_file(str(aside / "golden.arrow"), golden.schema) as writer:
            writer.write_table(golden)
        files = {str(path.relative_to(aside)): _sha256(path) for path in sorted(aside.rglob("*")) if path.is_file()}
        manifest = replace(manifest, files=files)
        (aside / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1, allow_nan=False) + "\n")
        load_artifact(aside, verify=True)
    return manifest


def read_golden(folder: Path) -> pa.Table:
    """The golden rows of an artifact, with their scores. Raises ArtifactError if the file is missing or corrupt."""
    try:
        with pa.ipc.open_file(str(folder / "golden.arrow")) as reader:
            return reader.read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise ArtifactError(f"{folder / 'golden.arrow'} cannot be read: {error}") from error


def _check_files(folder: Path, manifest: ArtifactManifest) -> None:
    if not manifest.files:
        raise ArtifactError(f"{folder}: the manifest lists no files; it was not written by write_artifact")
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{folder} is incomplete: {name} is missing")
        if _sha256(path) != expected:
            raise ArtifactError(f"{folder} is corrupt: {name} has another checksum than the manifest says")


def _largest_difference(scores: Sequence[float] | np.ndarray, expected: np.ndarray) -> float:
    """NaN (which fails every comparison) if any score is."""
    return float(np.max(np.abs(np.asarray(scores, np.float64) - expected)))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tensor_info(item: Any) -> TensorInfo:
    shape = tuple(size if isinstance(size, int) else -1 for size in item.shape)
    return TensorInfo(item.name, _OIP_TYPES.get(item.type, item.type), shape)
