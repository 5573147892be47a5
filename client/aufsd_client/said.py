"""Why something that is no call of the daemon's cannot be done."""


class Said(Exception):
    """What is wrong, and what to do, as a sentence for a person."""
