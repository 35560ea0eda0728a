"""Errors that a person can act on."""


class UserError(Exception):
    """Bad input or a bad setting; the message is one sentence that holds the fix.

    The command line prints the message without a traceback and exits with code 2.
    """
