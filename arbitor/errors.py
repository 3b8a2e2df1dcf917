"""Errors that the user can mend."""


class UserError(ValueError):
    """Something that was given cannot be used; the message is one line saying what and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """
