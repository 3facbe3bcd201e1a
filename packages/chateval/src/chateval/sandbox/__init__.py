"""Run model-written Python in isolation."""
