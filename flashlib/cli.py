"""The `flashlib` command. Each sub-command lives beside what it does and is imported only when it runs."""

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False)
