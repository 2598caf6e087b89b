"""``python -m weightdiff``: the command without its script."""

from weightdiff.cli import main

main(prog_name="weightdiff")
