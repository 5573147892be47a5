"""Layer content as a stream: tar in, tar out, and what differs."""
