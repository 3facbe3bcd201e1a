"""A build on disk: write shards, read them back memory-mapped, and choose which tokens are targets."""
