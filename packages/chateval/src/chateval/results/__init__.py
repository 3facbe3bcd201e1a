"""What a scoring run writes: items, the figures computed from them, comparisons and reports."""
