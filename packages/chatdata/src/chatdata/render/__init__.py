"""Turn conversations into tokens and mask: one at a time as the specification says, or many at once for a build."""
