"""On-demand features: one function for training and serving, pinned by its module's hash."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pandas as pd
import pytest

from feature_repo.transforms import request_context
from plait.errors import SpecError
from plait.transforms import load_transform, module_sha, on_demand_view, transform_reference


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A module of transforms that uses a helper and an import, which stock Feast would lose."""
    path = tmp_path / "plait_test_transforms.py"
    path.write_text(
        textwrap.dedent(
            """
            import math
            import pandas as pd

            def _helper(x):
                return math.sqrt(x)

            def root(inputs):
                return pd.DataFrame({"root": inputs["x"].astype(float).map(_helper)})
            """
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield path
    sys.modules.pop("plait_test_transforms", None)


def view_of(function, **settings):
    from feast import Field, RequestSource
    from feast.types import Float64, Int64

    source = RequestSource(name="numbers", schema=[Field(name="x", dtype=Int64)])
    given = {"schema": [Field(name="root", dtype=Float64)]} | settings
    return on_demand_view(name="roots", sources=[source], function=function, **given)


def test_a_view_read_back_from_the_registry_still_has_its_helpers_and_imports(module):
    import plait_test_transforms
    from feast import OnDemandFeatureView

    view = OnDemandFeatureView.from_proto(view_of(plait_test_transforms.root).to_proto())
    found = view.feature_transformation.udf(pd.DataFrame({"x": [4, 9]}))
    assert found["root"].tolist() == [2.0, 3.0]
    reference, sha = transform_reference(view)
    assert reference == "plait_test_transforms:root" and sha == module_sha("plait_test_transforms")
    assert load_transform(reference, sha) is plait_test_transforms.root


def test_a_change_anywhere_in_the_module_changes_the_view_and_refuses_the_old_hash(module):
    import plait_test_transforms

    before = view_of(plait_test_transforms.root)
    reference, sha = transform_reference(before)
    module.write_text(module.read_text().replace("math.sqrt(x)", "math.sqrt(x) + 1"))
    assert view_of(plait_test_transforms.root).to_proto() != before.to_proto()
    with pytest.raises(SpecError, match=r"has changed since it was registered.*feast apply"):
        load_transform(reference, sha)


def test_what_feast_would_get_wrong_is_refused(module):
    import plait_test_transforms
    from feast import Field
    from feast.types import Float32

    with pytest.raises(SpecError, match="only the first row"):
        view_of(plait_test_transforms.root, singleton=True)
    with pytest.raises(SpecError, match="Float64 or Int64"):
        view_of(plait_test_transforms.root, schema=[Field(name="root", dtype=Float32)])
    with pytest.raises(SpecError, match="cannot be imported by name"):
        view_of(lambda inputs: inputs)


def test_a_function_that_is_gone_is_named():
    with pytest.raises(SpecError, match=r"feature_repo\.transforms:gone cannot be imported"):
        load_transform("feature_repo.transforms:gone")


def test_request_context_of_a_known_moment():
    """2024-05-01 13:45:10 UTC was a Wednesday."""
    found = request_context(
        pd.DataFrame({"request_timestamp": [1714571110, 1714571110], "user_last_event_at": [1714571110 - 43_200, None]})
    )
    assert found["hour"].tolist() == [13, 13] and found["weekday"].tolist() == [2, 2]
    assert found["days_since_last_event"].tolist()[0] == 0.5 and pd.isna(found["days_since_last_event"][1])


def test_request_context_knows_no_row_by_its_neighbours():
    rows = pd.DataFrame({"request_timestamp": range(1_714_000_000, 1_715_000_000, 99_999), "user_last_event_at": 1})
    whole = request_context(rows)
    alone = pd.concat([request_context(rows.iloc[[i]]) for i in range(len(rows))])
    pd.testing.assert_frame_equal(whole, alone)
