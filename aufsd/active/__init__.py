"""The active-mount table, whole: what is mounted, who counts it, and the calls that make it so."""
