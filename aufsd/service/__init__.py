"""Living with systemd and monitoring."""
