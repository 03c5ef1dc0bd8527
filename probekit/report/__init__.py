"""What a run shows: figures, a page, tables in the terminal."""
