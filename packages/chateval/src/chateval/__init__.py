"""The scorer: answers of a checkpoint, item by item, and the figures computed from them."""
