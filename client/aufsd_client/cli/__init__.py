"""aufsctl, the command line over the client library (extra: cli)."""
