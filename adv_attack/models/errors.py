"""The one exception that ends a script with its message alone; every other one shows its traceback."""


class UserError(ValueError):
    """What the user gave (a flag, a file, a config, a checkpoint) cannot work; the message says what is allowed."""
