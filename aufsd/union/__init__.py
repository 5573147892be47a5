"""Union file systems: one module each, behind the Protocol of backend.py."""
