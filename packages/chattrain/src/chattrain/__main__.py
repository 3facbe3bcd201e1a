"""`python -m chattrain`, as torchrun calls it."""

from chattrain.cli import main

main()
