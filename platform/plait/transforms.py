"""On-demand feature views whose body is a function in an importable module, pinned by the module's hash.

Feast stores a transformation as source text and runs it with nothing but pandas and numpy in scope, so a helper or an
import of its module is lost at read time, silently for the registry. What is registered here is therefore two lines:
an import of the real function and the SHA-256 of its module. Training, serving and tests then run one function, and
a change anywhere in its module changes the registered view.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from plait.errors import SpecError

if TYPE_CHECKING:
    import pandas as pd
    from feast import FeatureView, Field, OnDemandFeatureView, RequestSource

    Transform = Callable[[pd.DataFrame], pd.DataFrame]

_TEMPLATE = """\
def {function}(inputs):
    # plait transform {module}:{function} sha256:{sha}
    from {module} import {function} as function
    return function(inputs)
"""
_MARK = re.compile(r"# plait transform (?P<reference>[\w.]+:\w+) sha256:(?P<sha>[0-9a-f]{64})")


def on_demand_view(
    *,
    name: str,
    sources: Sequence[FeatureView | RequestSource],
    schema: Sequence[Field],
    function: Transform,
    singleton: bool = False,
    description: str = "",
    tags: dict[str, str] | None = None,
) -> OnDemandFeatureView:
    """An on-demand feature view that runs `function`: DataFrame of the inputs -> DataFrame of `schema`.

    function: defined at the top of an importable module (feature_repo/transforms.py), vectorised, reading only columns
    of `sources`. schema: Float64 and Int64 fields; other types come out differently offline and online.
    Raises SpecError for anything else, and for singleton, with which Feast transforms only the first row.
    """
    from feast import OnDemandFeatureView
    from feast.transformation.pandas_transformation import PandasTransformation
    from feast.types import Float64, Int64

    if singleton:
        raise SpecError(f"{name}: singleton transforms compute only the first row of a request; leave it out")
    for field in schema:
        if field.dtype not in (Float64, Int64):
            raise SpecError(f"{name}: feature {field.name!r} is {field.dtype}; on-demand features are Float64 or Int64")
    module, function_name = function.__module__, function.__qualname__
    if not function_name.isidentifier() or module == "__main__":
        raise SpecError(
            f"{name}: {module}.{function_name} cannot be imported by name; "
            "define the function at the top of a module such as feature_repo/transforms.py"
        )
    source = _TEMPLATE.format(function=function_name, module=module, sha=module_sha(module))
    return OnDemandFeatureView(
        name=name,
        sources=list(sources),
        schema=list(schema),
        feature_transformation=PandasTransformation(udf=function, udf_string=source),
        mode="pandas",
        description=description,
        tags=tags or {},
    )


def transform_reference(view: OnDemandFeatureView) -> tuple[str, str]:
    """("package.module:function", sha256 of the module) of a view made by `on_demand_view`.

    Raises SpecError for a view with a body of its own.
    """
    text = getattr(view.feature_transformation, "udf_string", "") or ""
    match = _MARK.search(text)
    if match is None:
        raise SpecError(
            f"on-demand view {view.name!r} holds code of its own, which loses its imports when read back; "
            "declare it with plait.transforms.on_demand_view"
        )
    return match["reference"], match["sha"]


def load_transform(reference: str, sha: str | None = None) -> Transform:
    """The function behind a reference; with `sha`, only if its module is still the registered one.

    Raises SpecError if it cannot be imported or its module has changed since `feast apply`.
    """
    module, _, name = reference.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SpecError(
            f"transform {reference} cannot be imported ({error}); run from the project's folder, or install its module"
        ) from error
    if sha is not None and (found := module_sha(module)) != sha:
        raise SpecError(
            f"transform {reference} has changed since it was registered (module is {found[:12]}, registry says "
            f"{sha[:12]}): run `feast apply`, then build datasets and train again; or restore the module"
        )
    return function


def module_sha(module: str) -> str:
    """SHA-256 of the source file of an importable module, in hex."""
    path = getattr(sys.modules.get(module) or importlib.import_module(module), "__file__", None)
    if path is None:
        raise SpecError(f"module {module} has no source file to pin; define transforms in a plain .py file")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def output_column(outputs: pd.DataFrame, name: str, dtype: pa.DataType, size: int, reference: str) -> pa.Array:
    """Column `name` of what a transform returned for `size` rows, as `dtype`. Raises SpecError if it is not that."""
    if name not in outputs.columns or len(outputs) != size:
        raise SpecError(
            f"transform {reference} returned {len(outputs)} rows of {list(outputs.columns)}; "
            f"expected {size} rows with {name!r}"
        )
    try:
        return pa.array(outputs[name], type=dtype, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise SpecError(f"transform {reference}: output {name!r} is not {dtype}: {error}") from error
