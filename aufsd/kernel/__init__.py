"""The kernel's interfaces: the only ctypes in the project."""
