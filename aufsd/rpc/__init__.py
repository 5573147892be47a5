"""JSON-RPC over Unix sockets: connections, lines, requests, answers."""
