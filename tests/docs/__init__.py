"""What the documentation says to type is typed."""
