"""What Usagi sees."""
