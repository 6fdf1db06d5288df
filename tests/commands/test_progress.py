"""Long commands draw a bar on a terminal and only there, and their result lines stay whole."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

from plait.cli import cli
from plait.progress import progress_bar

SYNTHETIC = ["data", "prepare", "synthetic", "--users", "40", "--items", "30", "--requests", "300", "--replace"]
IMPORT = ["data", "import", "feedback", "clicks.csv", "--constant", "type=click"]
BARS = {  # what each command draws at its end
    "prepare": (SYNTHETIC, r"synthetic: 100%.*300/300 "),
    "import": (IMPORT, r"import feedback: 3\.00 rows "),
    "samples": (["samples", "build"], r"samples:  86%.* 6/7 .*write"),
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "feature_store.yaml").write_text("")
    (tmp_path / "clicks.csv").write_text("user_id,item_id,timestamp\n1,2,1704100000\n2,3,1704100001\n3,4,1704100002\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PLAIT_HOME", raising=False)
    cli.main(SYNTHETIC, standalone_mode=False)
    return tmp_path


@pytest.mark.parametrize("name", BARS)
def test_a_terminal_sees_a_bar_and_a_log_does_not(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    words, bar = BARS[name]
    capsys.readouterr()
    cli.main(words, standalone_mode=False)
    plain = capsys.readouterr()
    assert plain.err == ""
    assert len(plain.out) > 20

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    cli.main(words, standalone_mode=False)
    drawn = [part.rstrip() for part in re.split(r"[\r\n]+", screen.getvalue())]
    assert any(re.search(bar, part) for part in drawn), drawn
    # The same lines as without a terminal, none of them behind a piece of the bar, and no bar after the last.
    assert [part for part in drawn if part in plain.out.splitlines()] == plain.out.splitlines()
    assert screen.getvalue().endswith(plain.out.splitlines()[-1] + "\n")


def test_a_bar_is_gone_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with pytest.raises(ValueError, match="broken"), progress_bar("work", unit="step") as progress:
        progress("first", 1, 2)
        raise ValueError("broken")
    assert "work:  50%" in screen.getvalue()
    assert re.search(r"first\]\r +\r$", screen.getvalue())  # overwritten by spaces
