"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """Input the user can mend: the message is one line saying what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with status 2.
    """
