"""Ask a checkpoint: questions as prompts, letters and generated answers, graded line by line."""
