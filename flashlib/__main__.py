"""The `flashlib` command, also as `python -m flashlib`."""

import sys
from importlib.util import find_spec

NEEDED = ("typer", "rich", "psutil", "tabulate")


def main() -> None:
    """Run the command; without what it needs, which the library does not, say so and how to get it."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(
            f"flashlib: the command line needs {', '.join(missing)}, not installed here: pip install 'flashlib[cli]'"
        )
    from flashlib.cli import app

    app()


if __name__ == "__main__":
    main()
