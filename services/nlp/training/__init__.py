"""Training: PyTorch; serving never imports it."""
