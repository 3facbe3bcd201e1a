"""The `chatdata` command, one file for each group of subcommands."""

from chatdata.cli.app import cli, main

__all__ = ["cli", "main"]
