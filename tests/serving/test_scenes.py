"""scenes.yaml: what is declared, and what is refused with the place of the fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plait.errors import SpecError
from serving.scenes import DEFAULT_FILE, load_scenes, parse_scenes


def test_the_shipped_scenes_have_a_home() -> None:
    home = load_scenes(DEFAULT_FILE)["home"]
    assert home.max_candidates == 1000 and home.history_feature == "user_last_movies"


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (None, "expected `scenes:`"),
        ({"scenes": []}, "expected `scenes:`"),
        ({"scenes": {"home": 3}}, "must be a mapping"),
        ({"scenes": {"home": {}}}, "names no default_model"),
        ({"scenes": {"home": {"default_model": "a", "topk": 3}}}, "did you mean 'top_k'"),
        ({"scenes": {"home": {"default_model": "a", "top_k": 0}}}, "whole number from 1 on"),
        ({"scenes": {"home": {"default_model": "a", "max_candidates": True}}}, "whole number from 1 on"),
        ({"scenes": {"home": {"default_model": ""}}}, "default_model is empty"),
        ({"scenes": {"home": {"default_model": 3}}}, "must be a string"),
    ],
)
def test_a_wrong_declaration_is_refused(document: Any, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        parse_scenes(document)


def test_a_file_that_is_no_yaml_or_is_not_there_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "scenes.yaml"
    with pytest.raises(SpecError, match=r"cannot read .*scenes\.yaml"):
        load_scenes(broken)
    broken.write_text("scenes: [")
    with pytest.raises(SpecError, match="is not YAML"):
        load_scenes(broken)
