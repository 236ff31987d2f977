"""The typed Python client and the `usagi` command."""
