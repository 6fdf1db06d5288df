"""What docs/experiments.md shows is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments.conditions import OPERATORS
from experiments.shape import schema
from experiments.snapshot import Snapshot
from experiments.source import SECTIONS, merge, read_file, read_text
from experiments.validate import check

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
WHOLE = [block for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL) if block.startswith("layers:")]


def test_there_are_examples():
    assert len(WHOLE) == 4


@pytest.mark.parametrize("block", WHOLE)
def test_examples_are_valid(block):
    source = merge([read_file(ROOT / "experiments" / "parameters.yaml"), read_text(block)])
    spec, problems = check(source, models={"deepfm", "lightgbm", "logistic"})
    assert spec is not None, list(map(str, problems))


def test_the_ramp_of_the_tutorial_fits_its_experiment():
    ramp = next(
        block
        for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
        if "ramp:" in block and "    start" in block
    )
    text = WHOLE[0].replace(re.search(r"    traffic: 10.*\n", WHOLE[0])[0], ramp)
    source = merge([read_file(ROOT / "experiments" / "parameters.yaml"), read_text(text)])
    assert check(source)[0] is not None


def test_the_tutorials_unit_is_explained_as_shown():
    source = merge([read_file(ROOT / "experiments" / "parameters.yaml"), read_text(WHOLE[0])])
    (layer,) = Snapshot.of(source.document).explain("42").layers
    shown = f"rank (user) bucket {layer.bucket} → {layer.experiment}.{layer.arm} (forced): {layer.why}"
    assert shown in TEXT


def test_every_operator_and_section_is_documented():
    for name in [*OPERATORS, *SECTIONS]:
        assert f"`{name}`" in TEXT, name
    for name in schema()["$defs"]["experiment"]["properties"]:
        assert f"`{name}`" in TEXT or f"`{name}:" in TEXT, name
