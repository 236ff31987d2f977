"""One package a domain, each with the same rooms; services never import each other."""
