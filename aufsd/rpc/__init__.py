"""The edge: sockets, frames, JSON-RPC."""
