"""One file a model; importing this package registers them all."""
