"""`python -m squeeze.cli`: the command line where its script is not on the path."""

from squeeze.cli.main import main

main(prog_name="squeeze")
