"""The help teaches: its examples parse, what it names exists, and it is there with `python -m` too."""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from plait.cli import cli
from plait.commands.samples import merged_spec
from plait.data.readers import REQUIRED

ROOT = Path(__file__).parents[2]
TAUGHT = (
    ["data"],
    ["data", "prepare"],
    ["data", "import"],
    ["samples"],
    ["samples", "build"],
    ["samples", "show"],
    ["dataset"],
    ["dataset", "build"],
    ["dataset", "list"],
    ["dataset", "show"],
)


def find(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words lead to, and those that are left for it."""
    command: click.Command = cli
    while isinstance(command, click.Group) and words:
        found = command.get_command(click.Context(command), words[0])
        assert found is not None, f"no command {words[0]!r} in {command.name!r}"
        command, words = found, words[1:]
    return command, words


def examples(command: click.Command) -> list[list[str]]:
    """The lines of its \\b blocks that start with plait, as a shell would split them."""
    blocks = [block for block in inspect.cleandoc(command.help or "").split("\n\n") if block.startswith("\b")]
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("plait ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_no_command_of_these_groups_is_left_out() -> None:
    for name in ("data", "samples", "dataset"):
        group, _ = find([name])
        assert isinstance(group, click.Group)
        assert {name, *group.commands} == {words[-1] for words in TAUGHT if words[0] == name}


@pytest.mark.parametrize("words", TAUGHT, ids=" ".join)
def test_the_examples_parse(words: list[str]) -> None:
    command, _ = find(words)
    shown = examples(command)
    assert shown
    for example in shown:
        assert example[: len(words)] == words
        target, rest = find(example)
        context = target.make_context(example[-1], list(rest))  # a wrong option or choice raises UsageError
        if model := context.params.get("model"):
            assert (ROOT / f"trainers/configs/{model}.yaml").exists()
        if example[:2] == ["samples", "build"]:
            flags = {name: value for name, value in context.params.items() if name not in ("engine", "memory")}
            merged_spec(flags.pop("spec_file"), flags)  # reads --label, --window, --negatives and --shares


@pytest.mark.parametrize("words", TAUGHT, ids=" ".join)
def test_the_next_step_is_a_command_that_exists(words: list[str]) -> None:
    text = " ".join((find(words)[0].help or "").split())
    _, next_, steps = text.partition("Next: ")
    assert next_
    for step in re.findall(r"`plait ([^`]+)`", steps):
        target, _ = find(step.split())
        assert not isinstance(target, click.Group), step


def test_the_columns_an_import_must_have_are_those_that_it_asks_for() -> None:
    text = find(["data", "import"])[0].help or ""
    for table, columns in REQUIRED.items():
        assert re.search(rf"^ *{table} +{', '.join(columns)}$", text, re.MULTILINE), table


def test_python_m_plait_is_the_command() -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        # From platform/, so that it is the plait beside these tests, wherever another one is installed.
        command = [sys.executable, "-m", "plait", *words]
        return subprocess.run(command, cwd=ROOT / "platform", capture_output=True, text=True)

    shown = run("--help")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("Usage: plait [OPTIONS] COMMAND")
    assert "Commands, in the order of the loop" in shown.stdout
    assert run("no-such-command").returncode == 2
