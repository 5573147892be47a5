"""Layer ids and mount labels: parsed once at the edge, trusted from there on."""

import re
from typing import NewType

from aufsd_client.errors import InvalidLabel, InvalidLayerId, InvalidParams

LayerId = NewType("LayerId", str)

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
# a label is quoted in mount options, so it must have no quote, backslash or line end
_LABEL = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff\"'\\]*")


def parse_id(text: str) -> LayerId:
    """The id, or InvalidLayerId. Docker's driver renames layers to `ID-removing` to delete them."""
    if not _ID.fullmatch(text) or text.endswith("-removing"):
        raise InvalidLayerId(
            "not a layer id: 1 to 200 of A-Z a-z 0-9 _ . -, beginning with a letter or digit, "
            "and not ending in -removing",
            id=text[:256],
        )
    return LayerId(text)


def is_id(text: str) -> bool:
    """Whether a name found on disk is a layer's."""
    return bool(_ID.fullmatch(text)) and not text.endswith("-removing")


def parse_label(text: str) -> str:
    """An SELinux context that mount options can carry, or InvalidLabel."""
    if not text:
        return text
    if len(text.encode("utf-8", "surrogatepass")) > 255 or not _LABEL.fullmatch(text):
        raise InvalidLabel(
            "not a mount label: an SELinux context of at most 255 bytes without control "
            "characters, quotes or a backslash"
        )
    return text


def parse_name(text: str) -> str:
    """The name of a reference, 1 to 255 bytes that can be printed, or "" for none; InvalidParams.

    It goes into the log and into tables as it is.
    """
    if len(text.encode("utf-8", "surrogatepass")) > 255 or not text.isprintable():
        raise InvalidParams("not a name of a reference: at most 255 bytes of printable UTF-8")
    return text
