"""Data sets with known factors."""
