"""Decide which documents make which training sequence, and which sequences make an epoch."""
