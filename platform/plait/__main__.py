"""`python -m plait`: the command, also where its script is not on PATH."""

from plait.cli import main

main()
