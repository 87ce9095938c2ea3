"""Reading what a user wrote: JSON, and values as a message shows them."""

import json
import os
from collections import Counter

from .errors import UserError

SHOWN = 80  # characters of a value in a message


def refuse(source, faults, shown=12):
    """Raise one UserError with all faults of a file, the first ones in full; nothing without faults."""
    if faults:
        more = [f"... and {len(faults) - shown} more"] if len(faults) > shown else []
        raise UserError("\n".join(f"{source}: {fault}" for fault in [*faults[:shown], *more]))


def show(value):
    """A value as JSON on one line, control characters escaped, at most 80 characters; what is not JSON by its type."""
    try:
        text = json.dumps(value[:SHOWN] if isinstance(value, str | list) else value)
    except (TypeError, ValueError, RecursionError):
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def parse_json(text, source):
    """The content of a JSON text. Raises UserError naming `source`, also for a key that stands twice in an object."""

    def no_duplicates(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            repeated = [show(key) for key, count in Counter(key for key, _ in pairs).items() if count > 1]
            more = f" and {len(repeated) - 5} more" if len(repeated) > 5 else ""
            raise UserError(f"{source}: duplicate key {', '.join(sorted(repeated)[:5])}{more}: keep one of them")
        return found

    def no_constant(word):
        raise UserError(f"{source}: not valid JSON ({word} is no number there)")

    try:
        return json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"{source}: not valid JSON (nested too deeply)") from None
    except ValueError as error:  # its message is one of syntax, or of an integer with thousands of digits
        raise UserError(f"{source}: not valid JSON ({error})") from None


def read_text(path):
    """Text of a UTF-8 file, without the byte-order mark that editors and spreadsheets put first. Raises UserError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{os.fspath(path)}: not UTF-8 text ({error})") from None


def read_json(path):
    """Content of a JSON file. Raises OSError, and UserError naming the file."""
    return parse_json(read_text(path), os.fspath(path))
