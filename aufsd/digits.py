"""Numbers in texts that others wrote: ASCII digits and nothing else, and not too many."""


def number(text: str | bytes, most: int) -> int | None:
    """A number in decimal digits, at most `most`; None if it is none.

    `int` takes signs, underscores, spaces and the digits of every alphabet, and raises for
    thousands of them; `isdigit` takes "²" too.
    """
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(most))):
        return None
    found = int(text)
    return found if found <= most else None
