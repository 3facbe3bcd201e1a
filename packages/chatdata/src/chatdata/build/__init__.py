"""Build a recipe: plan it, render what the cache lacks, write the splits, publish the folder."""
