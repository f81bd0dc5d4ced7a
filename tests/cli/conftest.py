"""Commands run in the tests' process, see `commands`."""

from commands import run_command, run_on_hub

__all__ = ["run_command", "run_on_hub"]
