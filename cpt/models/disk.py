"""What is particular to disks: bringing a file to them, and the errors that they cause."""

import os


def sync(path):
    """Wait until a file or folder is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_disk_error(error):
    """True for what a disk did: an OSError, or the form in which safetensors, tokenizers and torch report one."""
    return isinstance(error, OSError) or any(
        sign in str(error) for sign in ("(os error ", "PytorchStreamWriter failed", "inline_container.cc")
    )
