"""The error a user can mend."""

import click


class WeightdiffError(click.ClickException):
    """Tell a user in one sentence what is wrong, with which file or tensor, and what to do.

    On the command line it ends the program with ``exit_code`` (1 unless given) and no traceback.
    """

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click declares it on the class
