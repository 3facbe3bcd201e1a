"""What surrounds the training loop: settings, preparation, ranks, the log and its telemetry, trace."""
