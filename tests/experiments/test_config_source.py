"""YAML as it is read: places, plain types, and files that are broken or half there."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.source import Place, read_file, read_folder, read_text
from plait.errors import SpecError


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def test_every_key_knows_its_file_and_line():
    source = read_text("layers:\n  rank:\n    unit: user\n    parameters:\n      - a\n      - b\n", file="x.yaml")
    assert source.place(("layers", "rank", "unit")) == Place("x.yaml", 3)
    assert source.place(("layers", "rank", "parameters", 1)) == Place("x.yaml", 6)
    assert source.place(("layers", "rank", "missing", "deeper")) == Place("x.yaml", 2)


def test_scalars_are_those_of_yaml_1_2():
    text = "parameters:\n  a: [no, NO, on, 2026-03-01, 12:30, 0o7, 1_000, true, 3, 1e3, .5, ~, 0-4999]\n"
    expected = ["no", "NO", "on", "2026-03-01", "12:30", "0o7", "1_000", True, 3, 1000.0, 0.5, None, "0-4999"]
    assert read_text(text).document["parameters"]["a"] == expected


def test_files_of_a_folder_are_one_document_and_metrics_are_not_part_of_it(tmp_path):
    write(tmp_path, a="layers:\n  x: {}\n", b="layers:\n  y: {}\nexperiments: {}\n", metrics="metrics: [1]\n")
    (tmp_path / "notes.txt").write_text("not read")
    assert read_folder(tmp_path).document == {"layers": {"x": {}, "y": {}}, "experiments": {}}


def test_a_thing_in_two_files_names_both_places(tmp_path):
    write(tmp_path, a="layers:\n  x: {}\n", b="# comment\nlayers:\n  x: {}\n")
    with pytest.raises(SpecError, match=r"b.yaml:3: layers.x is already declared at a.yaml:2"):
        read_folder(tmp_path)


def test_a_switch_in_two_files_is_refused(tmp_path):
    write(tmp_path, a="enabled: true\n", b="enabled: false\n")
    with pytest.raises(SpecError, match=r"b.yaml:1: enabled is already declared at a.yaml:1"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers:\n  x: [1\n", r"f.yaml:\d: not YAML"),
        ("layers:\n\tx: 1\n", r"f.yaml:2: not YAML"),
        ("layers: {x: 1}\nlayers: {y: 1}\n", r"f.yaml:2: the key 'layers' is given twice; first at f.yaml:1"),
        ("experimnts: {}\n", r"f.yaml:1: no section 'experimnts'; did you mean 'experiments'"),
        ("- a\n", "the top must be sections"),
        ("just text\n", "the top must be sections"),
        ("layers: !!python/object/apply:os.system [ls]\n", "not allowed"),
        ("layers: !!binary aGk=\n", "not allowed"),
        ("layers: {[1, 2]: x}\n", "a key must be a plain text"),
        ("a: &a [x]\n---\nb: 1\n", "not YAML"),
        ("layers: *nowhere\n", r"f.yaml:1: not YAML: found undefined alias"),
        ("layers: &x {y: *x}\n", "too many values or too deep"),
        ("layers: " + "[" * 5000 + "\n", "nested too deeply|not YAML"),
    ],
)
def test_malformed_yaml_is_one_clear_error(text, message):
    with pytest.raises(SpecError, match=message):
        read_text(text, file="f.yaml")


def test_aliases_that_multiply_are_stopped():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(SpecError, match="too many values"):
        read_text("layers:\n  " + "\n  ".join(lines) + "\n")


def test_a_half_written_file_is_refused_at_every_length(tmp_path):
    """Cut anywhere but after a whole line, the file is refused; the rest is for validation to see."""
    text = "layers:\n  rank:\n    unit: user\n    parameters: [rank.model]\n"
    path = tmp_path / "f.yaml"
    for length in range(len(text)):
        path.write_text(text[:length])
        if text[:length].endswith("\n"):
            continue
        with pytest.raises(SpecError, match="half-written"):
            read_file(path)
    path.write_text(text)
    assert read_file(path).document["layers"]["rank"]["unit"] == "user"


def test_a_file_that_is_not_utf_8_or_not_there_says_so(tmp_path):
    (tmp_path / "f.yaml").write_bytes(b"layers: \xff\n")
    with pytest.raises(SpecError, match=r"f.yaml is not UTF-8 \(byte 8\)"):
        read_file(tmp_path / "f.yaml")
    with pytest.raises(SpecError, match="No such file"):
        read_file(tmp_path / "g.yaml")
    with pytest.raises(SpecError, match=r"no \*.yaml in"):
        read_folder(tmp_path / "nowhere")


def test_a_huge_text_is_refused_before_it_is_parsed():
    with pytest.raises(SpecError, match="at most"):
        read_text("#" * 2_000_001)
