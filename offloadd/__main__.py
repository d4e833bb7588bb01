"""`python -m offloadd` is the `offloadd` command."""

from offloadd.cli import main

main()
