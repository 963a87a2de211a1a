"""`python -m reapkit`."""

from reapkit.cli import main

main()
