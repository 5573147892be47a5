"""Parses numbers from other programs: ASCII digits only, and not too many."""


def number(text: str | bytes, most: int) -> int | None:
    """A number from decimal digits; None if it is none, or above `most`.

    `int` also accepts signs, underscores, spaces and the digits of other scripts, and raises for
    thousands of digits. `isdigit` also accepts "²".
    """
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(most))):
        return None
    found = int(text)
    return found if found <= most else None
