"""Progress of long work: who does it calls back, who asked for it draws a bar on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

# What is being done, how much of the whole is done, and how much the whole is (None: nobody knows yet).
Progress = Callable[[str, int, int | None], None]


def silent(what: str, done: int, total: int | None) -> None:
    """Show nothing."""


def stepwise(progress: Progress, steps: Sequence[str]) -> Callable[[str], None]:
    """A function to call with the name of each of `steps` as it begins."""
    return lambda step: progress(step, steps.index(step), len(steps))


@contextmanager
def progress_bar(name: str, *, unit: str, scale: bool = False) -> Iterator[Progress]:
    """A bar on stderr while the block runs, and nothing if stderr is no terminal. scale: write 1,200,000 as 1.2M."""
    from tqdm import tqdm

    with tqdm(desc=name, unit=unit, unit_scale=scale, leave=False, disable=None) as bar:

        def show(what: str, done: int, total: int | None) -> None:
            bar.total = total
            bar.set_postfix_str(what, refresh=False)
            bar.update(done - bar.n)
            bar.refresh()

        yield show


@contextmanager
def beside_bars() -> Iterator[None]:
    """Takes the bars away while the block prints to stdout, so that its lines do not run into them."""
    from tqdm import tqdm

    with tqdm.external_write_mode():
        yield
