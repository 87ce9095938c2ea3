"""Keep the governed copies identical to their originals.

    python tests/check_copies.py                             list every copy that has drifted; exit 1 if there is one
    python tests/check_copies.py --fix                       rewrite the copies from their originals
    python tests/check_copies.py --promote cpt/utils_qa.py   make this edited copy the original, then fix its siblings

A whole-file copy has `# Copied from base_model/utils_qa.py` as its first line (below the shebang, if there is one).
A copied top-level function or class has `# Copied from base_model/run_qa.py:parse_args` directly above it.
A line that begins with these words is always a marker. Copies of copies and renamed copies are refused.
In a C file // stands for #.
"""

import argparse
import ast
import difflib
import os
import re
from collections import namedtuple
from pathlib import Path

ATTEMPT = re.compile(r"\s*(?:#+|//)\s*copied from\b", re.IGNORECASE)
MARKER = re.compile(r"(?:#|//) Copied from ((?:[\w-]+/)*[\w-]+\.(?:py|sh|c))(?:(?<=\.py):(\w+))?")
WANTED = "want '# Copied from DIR/FILE' as the first line, or '# Copied from DIR/FILE.py:NAME' directly above NAME"
REPAIR = "Repair: python tests/check_copies.py --fix   (or --promote FILE, if the edit in the copy FILE is right)"
Copy = namedtuple("Copy", "path source name")  # both paths are relative to the root; name is None for a whole file


def read(path):
    # Split at "\n" alone, so that line endings and a missing final newline count as differences.
    return path.read_bytes().decode("utf-8", "surrogateescape").split("\n")


def replace(path, new):
    old, temporary = read(path), path.with_name(".check_copies.tmp")
    if new != old:
        print("\n".join(difflib.unified_diff(old, new, f"{path} (discarded)", f"{path} (new)", lineterm="")))
        temporary.write_bytes("\n".join(new).encode("utf-8", "surrogateescape"))
        temporary.chmod(path.stat().st_mode)
        os.replace(temporary, path)


def spans(path):
    """Map each top-level function and class to its half-open, 0-based line span, decorators included."""
    nodes = [n for n in ast.parse("\n".join(read(path)), path).body if hasattr(n, "decorator_list")]
    return {n.name: (min([n.lineno, *(d.lineno for d in n.decorator_list)]) - 1, n.end_lineno) for n in nodes}


def whole_marker(lines):
    """The index of the line that marks the whole file as a copy, or None."""
    at = int(lines[0].startswith("#!"))
    match = MARKER.fullmatch("".join(lines[at : at + 1]))
    return at if match and not match[2] else None


def merged(giver, taker, name):
    """The lines of `taker`, with its object `name` (None: everything but the marker) taken from `giver`."""
    new, old = read(giver), read(taker)
    if name:
        (first, last), (start, stop) = spans(giver)[name], spans(taker)[name]
        return old[:start] + new[first:last] + old[stop:]
    body = [line for i, line in enumerate(new) if i != whole_marker(new)]
    at, taken = int(body[0].startswith("#!")), whole_marker(old)
    return body if taken is None else body[:at] + [old[taken]] + body[at:]


def declared(root, path, index):
    """The copy that the marker in line `index` declares; ValueError where it or its original cannot be used."""
    lines = read(root / path)
    match = MARKER.fullmatch(lines[index])
    source, name = match.groups() if match and Path(match[1]).suffix == Path(path).suffix else (None, None)
    placed = spans(root / path).get(name, (0,))[0] == index + 1 if name else index == whole_marker(lines)
    if not source or not placed:
        raise ValueError(f"malformed marker at line {index + 1}: {WANTED}")
    if not (root / source).is_file():
        raise ValueError(f"original {source} does not exist")
    original, span = read(root / source), spans(root / source).get(name) if name else (0, 0)
    if span is None:
        raise ValueError(f"original {source} has no top-level function or class {name}")
    if whole_marker(original) is not None or (name and ATTEMPT.match(original[span[0] - 1])):
        raise ValueError(f"original {source} is itself a copy: name the first original")
    return Copy(path, source, name)


def check(root):
    """The usable copies, and one message for each copy that has drifted and each marker that is wrong."""
    copies, messages = [], []
    for folder, folders, names in os.walk(root):
        # A folder with config.json is a saved model, which may ship a snapshot of the model code.
        skip = {f for f in folders for m in ("pyvenv.cfg", "config.json") if Path(folder, f, m).exists()}
        folders[:] = sorted(f for f in folders if f not in skip and not re.match(r"\.|tests$", f))
        for file in sorted(Path(folder, n) for n in names if n.endswith((".py", ".sh", ".c"))):
            path, lines = file.relative_to(root).as_posix(), read(file)
            found = [i for i, line in enumerate(lines) if ATTEMPT.match(line)]
            # In a whole-file copy, the markers further down belong to the original.
            for index in found if whole_marker(lines) is None else found[:1]:
                try:
                    copies.append(copy := declared(root, path, index))
                    wanted, original = merged(root / copy.source, file, copy.name), ":".join(filter(None, copy[1:]))
                    if lines != wanted:
                        line = len(os.path.commonprefix([lines, wanted])) + 1
                        messages.append(f"- {path}: copy does not match {original} at line {line}")
                except (SyntaxError, ValueError) as error:
                    messages.append(f"- {path}: {error}")
    return copies, messages


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fix", action="store_true", help="rewrite all copies from their originals")
    parser.add_argument("--promote", metavar="FILE", help="an edited copy, relative to the root of the repository")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1])
    args = parser.parse_args()
    root = args.root.resolve()
    promoted = [c for c in check(root)[0] if args.promote and root / c.path == (root / args.promote).resolve()]
    if args.promote and not promoted:
        parser.error(f"--promote {args.promote}: no usable marker there; to spread an edited original, use --fix")
    for copy in promoted:
        replace(root / copy.source, merged(root / copy.path, root / copy.source, copy.name))
    for copy in sorted(check(root)[0], key=lambda c: c.name is None):  # objects first: whole files contain them
        related = [p for p in promoted if copy.source == p.source and (not copy.name or p.name in (None, copy.name))]
        if args.fix or related:
            replace(root / copy.path, merged(root / copy.source, root / copy.path, copy.name))
    copies, messages = check(root)
    print("\n".join([*messages, REPAIR]) if messages else f"{len(copies)} copies in sync")
    return 1 if messages else 0


if __name__ == "__main__":
    raise SystemExit(main())
