"""The one exception that a user's own input can cause."""


class UserError(Exception):
    """A mistake that the user can mend: one line saying what was given, what was expected and what to do.

    The command line prints the message alone and exits with status 2.
    """
