"""What is asked for and cannot be: one sentence for the person who asked."""


class Refused(Exception):
    """The message says what is wrong and what to do next."""
