"""Readers of the papers' own checkpoint files. Nothing that a file brings along is ever run."""
