"""What surrounds the loop of a training run: settings, ranks, log and progress, dry run, trace."""
