"""Turn conversations into tokens and mask: one at a time (the specification), or many at once for a build."""
