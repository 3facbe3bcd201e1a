"""What a scoring run leaves: items, the figures computed from them, comparisons and reports."""
