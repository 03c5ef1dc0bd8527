"""The one error that means: the user can mend this."""


class ProbekitError(ValueError):
    """Bad input, said in one line that names the option, the value and what would do."""
