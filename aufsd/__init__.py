"""aufsd: layered root file systems on one host, served over a Unix socket."""

__version__ = "0.1.0"
