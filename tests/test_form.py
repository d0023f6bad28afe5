"The form of everything: ruff is content, and the thermometer does not slide back."

import subprocess
import sys

import form
import pytest
from conftest import ROOT


@pytest.mark.parametrize('words', [('format', '--check'), ('check',)], ids=lambda w: w[0])
def test_ruff(words):
    "Pages, package, tests, tools and benchmarks."
    command = [sys.executable, '-m', 'ruff', *words, '.']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_thermometer():
    found = form.measure()
    for what, value in found.items():
        print(f'{what:12} {value:8} (limit {form.LIMITS[what]})')
    too_much = {what: value for what, value in found.items() if value > form.LIMITS[what]}
    assert not too_much


TOWER = """
@dataclass
class Row:
    "A row."

    def lines(self):  # a comment
        "Docstring."
        x = 1; y = 2
        return [x, y]
"""


def test_what_is_counted():
    assert form.semicolons(TOWER) == 1
    assert form.functions(TOWER) == [('lines', 2, False)]
    assert form.bindings(form.parsed(TOWER)) == ['self', 'x', 'y']
    assert form.tokens_per_line('a = b + c  # d') == [5]
    assert form.lines('a\n\nb\n') == 2


def test_what_only_jupyter_reads_is_left_out():
    cell = '%matplotlib inline\nplot(\n    7\n    % 3\n);'
    assert form.semicolons(cell) == 0
    assert form.is_import('%env A=b\nimport math') is False
    assert form.is_import('import math\nfrom os import path') is True
