"""`python -m chateval`, as torchrun calls it."""

from chateval.cli import main

main()
