"""Byte-level BPE: load, save and train tokenizers, and encode many texts at once."""
