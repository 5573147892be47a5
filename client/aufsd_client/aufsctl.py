"""Where the command aufsctl begins: it runs the command line, or says what that lacks."""

import sys


def main() -> None:
    """The entry point. The library needs no other package; its command line needs two."""
    try:
        from aufsd_client.cli.__main__ import main as command_line

        command_line()
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        sys.exit(f"aufsctl: needs {error.name}: pip install 'aufsd-client[cli]'")


if __name__ == "__main__":
    main()
