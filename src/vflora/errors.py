"""Errors that a person can act on."""


class UserError(Exception):
    """Bad input or a bad setting; the message is one sentence that holds the fix.

    The command line prints the message without a traceback and exits with code 2.
    """


class NonFiniteError(UserError):
    """A loss or a gradient became infinite or not a number; the optimizer has not seen it."""

    def __init__(self, part: str, step: int | None = None):
        """Takes the part of the step, and the step once it is known."""
        where = "" if step is None else f" in step {step}"
        super().__init__(
            f"{part} is not finite{where}; the optimizer was not run and the last checkpoint is whole: "
            "resume from it with a lower --learning_rate or --max_grad_norm, or with --dtype fp32."
        )
        self.part, self.step = part, step
