"""Check a build: verify its files, render it again from its sources, compare it with another build."""
