"""Docker's data root, read without Docker: images and containers, under their names and ids.

Nothing is written below the data root, and neither dockerd nor a kernel with aufs is needed.
"""
