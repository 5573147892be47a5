"""The content of a served store: branches made ready, snapshots, checks, work in the background."""
