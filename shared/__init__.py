"""The common library: what at least three places need. It knows no service."""
