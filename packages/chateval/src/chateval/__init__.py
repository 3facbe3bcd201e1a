"""Score the answers of a checkpoint item by item, and compute figures from them."""
