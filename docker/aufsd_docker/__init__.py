"""Docker's graph driver plugin over aufsd (plugin protocol v1, experimental; Docker 1.12 to 27)."""

__version__ = "0.2.0"
