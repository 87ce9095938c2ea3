"""Keep the copies of the experiment folders identical.

    python tests/check_copies.py          list what differs; exit 1 if anything does
    python tests/check_copies.py --fix    rewrite them from base_model, or from the first folder that has the file

The rule: the same path under `common/` or `models/` means the same bytes in every folder, and so do trainer_qa.py,
utils_qa.py and run_qa_eval.py. A folder holds only the files that it uses.
"""

import argparse
import filecmp
import shutil
from pathlib import Path

FOLDERS = ("base_model", "switch_precision", "cpt", "adv_attack", "language_model")
TOP_LEVEL = ("trainer_qa.py", "utils_qa.py", "run_qa_eval.py", "common.sh")


def governed(root):
    """{path in a folder: [files that have it]}, base_model's first."""
    found = {}
    for folder in (root / name for name in FOLDERS):
        files = [folder / name for name in TOP_LEVEL] + [*folder.glob("common/**/*"), *folder.glob("models/**/*")]
        for file in sorted(f for f in files if f.is_file() and f.suffix in (".py", ".c", ".h", ".sh")):
            found.setdefault(file.relative_to(folder).as_posix(), []).append(file)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fix", action="store_true", help="rewrite the copies")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="the repository")
    args = parser.parse_args()
    copies = [(files[0], copy) for files in governed(args.root).values() for copy in files[1:]]
    drifted = [(original, copy) for original, copy in copies if not filecmp.cmp(original, copy, shallow=False)]
    for original, copy in drifted:
        print(f"{copy.relative_to(args.root)} differs from {original.relative_to(args.root)}")
        if args.fix:
            shutil.copyfile(original, copy)
    if drifted and not args.fix:
        print("Repair: python tests/check_copies.py --fix   (it takes the first named as wrong, the second as right)")
        return 1
    print(f"{len(copies)} copies {'rewritten where they differed' if drifted else 'in sync'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
