"""Text to ids and back; pure Python, shared by training and serving."""
