"""aufsd: layered root file systems on one host, served over a Unix socket."""

__version__ = "0.2.0"
