"""`python -m flashlib` is the `flashlib` command."""

from flashlib.cli import app

app()
