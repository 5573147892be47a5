"""One conformance suite over every backend of this host."""
