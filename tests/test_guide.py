"""The Python pieces of GUIDE.md and README.md run on a tiny model, and show what they say."""

import re
import subprocess
import sys

from conftest import ROOT


def pieces_of(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def run(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_first_look(tiny_model):
    questions, texts = pieces_of("README.md")
    printed = run(re.sub(r'folder = "[^"]*"', f"folder = {str(tiny_model)!r}", questions)).splitlines()
    sizes = [int(line.split()[-1]) for line in printed]
    assert len(sizes) == 3 and sizes[0] > sizes[1] > sizes[2]
    more = "\nprint(model.config.quantizer, model.rotations() is not None)"
    assert (
        run(texts.replace('folder, texts = "gpt2"', f"folder, texts = {str(tiny_model)!r}") + more) == "rotated True\n"
    )


def test_all_pieces_in_order(tiny_model):
    pieces = pieces_of("GUIDE.md")
    assert len(pieces) >= 11 and pieces[0].count('MODEL, TEXT = "gpt2", ') == 1
    pieces[0] = pieces[0].replace('"gpt2"', repr(str(tiny_model)))
    code = "\n".join(f"print('== {number}')\n{piece}" for number, piece in enumerate(pieces))
    printed = dict(enumerate(run(code).split("== ")[1:]))
    assert "[[ 0, -3,  7,  0]]" in printed[1]  # scale 0.1

    def numbers(piece):
        return [float(found) for found in re.findall(r"-?\d+\.\d+", printed[piece])]

    symmetric, asymmetric = numbers(2)
    assert asymmetric < symmetric
    tensor, channel = numbers(3)
    assert channel < 0.2 < 0.9 < tensor
    dynamic, static = numbers(4)
    assert dynamic < static
    before, after, full = numbers(6)[-3:]
    assert full == numbers(5)[0] and before != after
    assert "tensor([-2.0000, -1.1429,  0.0000,  1.1429,  2.0000])" in printed[7]
    assert "4 8" in printed[8].splitlines()[-1]
    (eight, four) = (float(line.split()[1]) for line in printed[9].splitlines()[1:])
    assert 0.5 < four / eight < 1
    fake, integer = numbers(10)[:3], numbers(10)[3:]
    assert max(abs(a - b) for a, b in zip(fake, integer, strict=True)) < 0.02
