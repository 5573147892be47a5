"""What is on disk: names, layers, recovery. Synchronous; nothing here mounts."""
