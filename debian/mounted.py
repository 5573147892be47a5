"""Says which layers are still mounted, for who removes the package."""

import sys

sys.path.insert(0, "/usr/lib/aufsd")

from aufsd import config
from aufsd.kernel import mountinfo


def main() -> None:
    """A sentence, and a line for each mount; nothing if there is none."""
    try:
        root = config.load(None, {}).root
    except config.ConfigError:
        root = config.Config().root
    points = sorted(mount.mount_point for mount in mountinfo.mounted_under(f"{root}/mnt/"))
    if points:
        print(f"aufsd is stopped. These layers of {root} stay mounted; umount(8) unmounts them:")
        print("".join(f"    {point}\n" for point in points), end="")


main()
