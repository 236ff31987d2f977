"""The gateway: Envoy in front, the catalog beside it."""
