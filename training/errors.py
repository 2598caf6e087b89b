"""The error a user can mend."""

import click


class TrainingError(click.ClickException):
    """Tell a user in one sentence what is wrong, with which file or setting, and what to do.

    On the command line it ends the program with exit code 1 and no traceback.
    """
