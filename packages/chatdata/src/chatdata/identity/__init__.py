"""Turn a persona file into conversations in which the assistant says who it is."""
