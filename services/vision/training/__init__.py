"""Training: torch; it meets serving only in the model repository."""
