"""What Usagi reads and writes."""
