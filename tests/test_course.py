"What a teacher relies on: the student edition holds no answers, and grades are earned."

import ast
import csv
import subprocess
import sys
from dataclasses import astuple

import course
import house
import pytest
import statistics_of_pages as stats
from conftest import ROOT

PAGE = house.NBS / 'ground' / '01_geometry.ipynb'
ANSWER = """
def slerp(a, b, t):
    b = b * (a @ b).sign()
    angle = (a @ b).clamp(-1, 1).arccos()
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()
"""


def placeholder(notebook):
    "The first code cell of the exercises."
    return next(c for c in course.parted(notebook)[1] if c['cell_type'] == 'code')


def handed(change):
    "The page with its placeholder changed."
    notebook = house.read(PAGE)
    cell = placeholder(notebook)
    cell['source'] = change(house.text(cell))
    return notebook


def solved(source):
    "The cell with an answer in place of its placeholder, which is a function."
    function = ast.parse(source).body[0]
    return ANSWER + '\n'.join(source.splitlines()[function.end_lineno :])


def with_check(source, words):
    "The cell with another check in place of its last line."
    return '\n'.join([*source.splitlines()[:-1], words])


def same_twice(source):
    "The truth compared with itself."
    (truth,) = course.checks([dict(cell_type='code', source=source)])
    return with_check(source, f'check({truth}, {truth})')


def other_truth(source):
    "An answer compared with something else than the page's truth."
    return with_check(source, 'check(slerp(a, b, 0.25), a)')


def own_check(source):
    return 'def check(*a): print("\\x00check 1"); return True\n' + source


@pytest.mark.parametrize(
    'change, passed, remark',
    [
        (lambda source: source, 0, ''),
        (solved, 1, ''),
        (same_twice, 0, ''),
        (other_truth, 0, 'truth was changed'),
        (own_check, 0, ''),
        (lambda source: 'oh no\n' + source, 0, 'SyntaxError'),
    ],
    ids=['as given', 'solved', 'same twice', 'another truth', 'an own check', 'an error'],
)
def test_grade(change, passed, remark):
    mark = course.grade(PAGE, handed(change))
    assert (mark.passed, mark.checks, mark.words) == (passed, 1, 0), mark
    assert remark in mark.remark, mark


def test_words_are_counted_and_a_broken_page_is_mended():
    notebook = handed(solved)
    notebook['cells'][2]['source'] = 'raise SystemExit'
    answer = 'Because quaternions double-cover rotations.'
    notebook['cells'].append(dict(cell_type='markdown', metadata={}, source=answer))
    assert astuple(course.grade(PAGE, notebook))[:3] == (1, 1, 4)


def test_grade_a_class(tmp_path):
    (tmp_path / 'anna').mkdir()
    (tmp_path / 'bert').mkdir()
    (tmp_path / 'anna' / '11_teeth.ipynb').write_text('{')
    (tmp_path / 'bert' / 'essay.ipynb').write_text('{}')
    out = tmp_path / 'grades.csv'
    command = [sys.executable, ROOT / 'tools' / 'course.py', 'grade', tmp_path, '--out', out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and 'passed over' in done.stdout, done.stderr
    head, *rows = csv.reader(out.open())
    assert head == ['student', 'page', 'passed', 'checks', 'words', 'remark']
    assert [row[:4] for row in rows] == [['anna', '11_teeth', '0', '1']]
    assert 'not a notebook' in rows[0][5]


def test_student_edition(tmp_path):
    copy = tmp_path / 'class'
    course.student(copy)
    made = sorted(p.relative_to(copy / 'nbs') for p in (copy / 'nbs').rglob('*.ipynb'))
    wanted = [p for p in house.notebooks() if p not in house.solutions()]
    assert made == sorted(p.relative_to(house.NBS) for p in wanted)
    for path in made:
        assert not any(c.get('outputs') for c in course.exercises(copy / 'nbs' / path)), path
    with pytest.raises(SystemExit, match='not empty'):
        course.student(copy)


def test_every_solved_page_has_its_exercises():
    book = course.pages()
    with_answers = {p.name for p in house.SOLUTIONS.glob('*.ipynb')}
    assert with_answers <= set(book), with_answers - set(book)
    for name in with_answers:
        assert course.checks(course.exercises(book[name])), f'{name} has no check(yours, truth)'
    # answers there are an experiment, or a class
    assert set(book) - with_answers <= {'ablations.ipynb', 'lesson_plan.ipynb'}


# ---- statistics of pages


def cell(kind, source, outputs=()):
    return dict(cell_type=kind, source=source, outputs=list(outputs), metadata={})


def test_statistics_on_a_page_made_by_hand():
    picture = dict(
        output_type='display_data', data={'image/jpeg': ''}, metadata={'image/jpeg': {'alt': 'a'}}
    )
    definitions = '#| export\ndef f(): return 1\n\ndef g(): return 2\n\ndef _h(): return 3'
    cells = [
        cell('markdown', '# A\n> b'),
        cell('code', definitions),
        cell('code', 'print(f())'),
        cell('markdown', ''),
        cell('code', 'x = 1\ny = 2', [picture]),
        cell('code', 'assert g()==2'),
    ]
    found = stats.measure(dict(cells=cells))
    assert (found['definitions'], found['shown'], found['asserted']) == (2, 2, 1)
    assert found['missing'] == ['f']
    assert (found['figures'], found['words'], found['without_alt']) == (1, 2, 0)


def test_the_course_keeps_its_own_measure():
    found = stats.every_page()
    total = stats.total(list(found.values()))
    assert total['shown'] >= 0.9, total
    assert total['asserted'] >= 0.6, total
    assert total['without_alt'] == 0, total
    assert total['largest_kb'] < 1000, total
    silent = [name for name, numbers in found.items() if not numbers['budget']]
    assert not silent, 'a page states the time it takes to run'
    assert stats.total(stats.lessons(found))['figures_per_10_cells'] >= 2
