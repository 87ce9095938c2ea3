"""The one exception that ends a script with its message alone; every other one shows its traceback."""


class UserError(ValueError):
    """What the user gave (a flag, a file, a config, a checkpoint) cannot work; the message says what is allowed."""


def is_disk_error(error):
    """True for what a disk did: an OSError, or the form in which safetensors, tokenizers and torch report one."""
    return isinstance(error, OSError) or any(
        sign in str(error) for sign in ("(os error ", "PytorchStreamWriter failed", "inline_container.cc")
    )
