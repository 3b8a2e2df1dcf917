"""Errors that the user can mend."""


def extra_command(extra: str) -> str:
    """The command that installs an extra, in the folder that the package was cloned into."""
    return f"pip install '.[{extra}]' in the clone"


class UserError(ValueError):
    """Something that was given cannot be used; the message is one line saying what and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """
