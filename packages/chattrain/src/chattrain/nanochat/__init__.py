"""Exchange with karpathy/nanochat and transformers: read checkpoints, train in nanochat's order, export."""
