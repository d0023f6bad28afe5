"What a teacher relies on: the student edition holds no answers, and grades are earned."

import csv
import json
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / 'tools'))
import course
import statistics_of_pages as stats


def page(name='01_geometry'):
    return json.loads((ROOT / 'nbs' / f'{name}.ipynb').read_text())


ANSWER = """
def slerp(a, b, t):
    b = b*(a@b).sign(); angle = (a@b).clamp(-1,1).arccos(); return (((1-t)*angle).sin()*a+(t*angle).sin()*b)/angle.sin()
"""


def handed(change):
    "The page with its placeholder changed."
    nb = page()
    c = next(c for c in course.parted(nb)[1] if c['cell_type'] == 'code')
    c['source'] = change(course.text(c))
    return nb


@pytest.mark.parametrize(
    'what, change, passed, remark',
    [
        ('as given', lambda s: s, 0, ''),
        ('solved', lambda s: ANSWER + s.split('\n', 1)[1], 1, ''),
        (
            'the truth compared with itself',
            lambda s: s.replace(
                'check(slerp(a, b, .25),',
                'check(mat_to_quat(axis_angle_to_mat(torch.tensor([0.,0,.25]))),',
            ),
            0,
            '',
        ),
        (
            'another truth',
            lambda s: s.replace('mat_to_quat(axis_angle_to_mat(torch.tensor([0.,0,.25])))', 'a'),
            0,
            'truth was changed',
        ),
        (
            'an own check',
            lambda s: 'def check(*a): print("\\x00check 1"); return True\n' + s,
            0,
            '',
        ),
        ('an error', lambda s: 'oh no\n' + s, 0, 'SyntaxError'),
    ],
    ids=lambda x: x if isinstance(x, str) else '',
)
def test_grade(what, change, passed, remark):
    got, of, words, said = course.grade(page(), handed(change))
    assert (got, of, words) == (passed, 1, 0) and remark in said, (got, of, words, said)


def test_words_are_counted_and_a_broken_page_is_mended():
    nb = handed(lambda s: ANSWER + s.split('\n', 1)[1])
    nb['cells'][2]['source'] = 'raise SystemExit'
    nb['cells'].append(
        dict(
            cell_type='markdown', metadata={}, source='Because quaternions double-cover rotations.'
        )
    )
    assert course.grade(page(), nb)[:3] == (1, 1, 4)


def test_grade_a_class(tmp_path):
    (tmp_path / 'anna').mkdir()
    (tmp_path / 'bert').mkdir()
    (tmp_path / 'anna' / '02d_teeth.ipynb').write_text('{')
    (tmp_path / 'bert' / 'essay.ipynb').write_text('{}')
    done = subprocess.run(
        [
            sys.executable,
            ROOT / 'tools' / 'course.py',
            'grade',
            tmp_path,
            '--out',
            tmp_path / 'g.csv',
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and 'passed over' in done.stdout, done.stderr
    rows = list(csv.reader(open(tmp_path / 'g.csv')))
    assert rows[1][:4] == ['anna', '02d_teeth', '0', '1']
    assert 'not a notebook' in rows[1][5]
    assert len(rows) == 2


def test_student_edition(tmp_path):
    course.student(tmp_path / 'class')
    made = sorted(p.name for p in (tmp_path / 'class' / 'nbs').glob('*.ipynb'))
    assert made == sorted(p.name for p in (ROOT / 'nbs').glob('*.ipynb'))
    assert not (tmp_path / 'class' / 'nbs' / 'solutions').exists()
    for p in (tmp_path / 'class' / 'nbs').glob('*.ipynb'):
        assert not any(c.get('outputs') for c in course.parted(json.loads(p.read_text()))[1])
    with pytest.raises(SystemExit, match='not empty'):
        course.student(tmp_path / 'class')


def test_every_solved_page_has_its_exercises():
    book = course.pages()
    solved = {p.name for p in (ROOT / 'nbs' / 'solutions').glob('*.ipynb')}
    assert solved <= set(book), solved - set(book)
    assert set(book) - solved <= {
        '24_ablations.ipynb',
        '26_lesson_plan.ipynb',
    }  # answers there are an experiment, or a class
    for n in solved:
        assert course.checks(course.parted(book[n])[1]), f'{n} has no check(yours, truth)'


# page statistics


def cell(kind, source, outputs=()):
    return dict(cell_type=kind, source=source, outputs=list(outputs), metadata={})


def test_statistics_on_a_page_made_by_hand():
    picture = dict(
        output_type='display_data', data={'image/jpeg': ''}, metadata={'image/jpeg': {'alt': 'a'}}
    )
    nb = dict(
        cells=[
            cell('markdown', '# A\n> b'),
            cell('code', '#| export\ndef f(): return 1\n\ndef g(): return 2\n\ndef _h(): return 3'),
            cell('code', 'print(f())'),
            cell('markdown', ''),
            cell('code', 'x = 1\ny = 2', [picture]),
            cell('code', 'assert g()==2'),
        ]
    )
    s = stats.measure(nb)
    assert (s['definitions'], s['shown'], s['asserted']) == (2, 2, 1)
    assert s['missing'] == ['f']
    assert s['figures'] == 1
    assert s['lines'] == [3, 1, 2, 1]
    assert s['words'] == 2
    assert s['without_alt'] == 0


def test_the_course_keeps_its_own_measure():
    found = {p.stem: stats.measure(json.loads(p.read_text())) for p in stats.pages()}
    t = stats.total(list(found.values()))
    assert (
        t['shown'] >= 0.9
        and t['asserted'] >= 0.6
        and t['median_lines'] <= 5
        and t['p90_lines'] <= 15
        and t['without_alt'] == 0
        and t['largest_kb'] < 1000
    ), t
    assert not [n for n, s in found.items() if not s['budget']], (
        'a page states the time it takes to run'
    )
    core = stats.total([s for n, s in found.items() if n.split('_')[0] in stats.CORE])
    assert core['figures_per_10_cells'] >= 2 and core['words_per_line'] >= 3, core
