"""What a run shows and leaves behind: one observable behaviour per file."""
