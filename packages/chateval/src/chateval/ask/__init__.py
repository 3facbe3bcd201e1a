"""Ask a checkpoint: run.py takes questions as prompts, gets letters or generated answers, and grades them."""
