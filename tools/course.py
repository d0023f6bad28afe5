"""For teachers: a student edition, and grades.

    python tools/course.py student OUT                      copy the pages for a class: no
                                                            solutions, exercises empty
    python tools/course.py grade FOLDER [--out grades.csv]  FOLDER has a folder of notebooks
                                                            per student
    python tools/course.py list                             the exercises of every page

A page's exercises are what follows its heading "Exercises". Grading runs each page as it is here up
to that heading, then the student's cells; so a page somebody broke, or a `check` somebody rewrote,
changes nothing. Counted is every `check(yours, truth)` of the page whose truth is still the page's,
and words written in answer to the rest: those a person reads. Students' code runs with your rights:
grade in a container, or an account of its own.
"""

import argparse
import ast
import csv
import json
import re
import shutil
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import house

HEADING = re.compile(r'^#+ Exercises', re.M)
NOT_HERE = re.compile(r'#\|\s*(cuda|eval:\s*false|fresh)')
CHEATS = re.compile(r'def check\b|\bcheck\s*=|_core')
PASSED = '\x00check 1'
# runs after the page: every check says whether it passed, in words no page prints
WATCH = """
import spatialavatar0.ground.core as _core

def check(yours, truth, *args, **more):
    ok = _core.check(yours, truth, *args, **more)
    print('\\x00check', int(bool(ok)))
    return ok
"""


@dataclass
class Grade:
    "What one student's notebook earns."

    passed: int = 0  # checks
    checks: int = 0  # that there are
    words: int = 0  # written in answer
    remark: str = ''  # what went wrong


def is_heading(cell):
    return cell['cell_type'] == 'markdown' and bool(HEADING.search(house.text(cell)))


def pages():
    "Pages that have exercises: name of the file -> its path."
    return {p.name: p for p in house.pages() if any(map(is_heading, house.read(p)['cells']))}


def parted(notebook):
    "Cells before the exercises, and from them on."
    cells = notebook['cells']
    i = next((i for i, cell in enumerate(cells) if is_heading(cell)), len(cells))
    return cells[:i], cells[i:]


def calls_of_check(cell):
    "The calls check(yours, truth) in a cell."
    try:
        tree = ast.parse(re.sub(r'^[%!].*$', '', house.text(cell), flags=re.M))
    except SyntaxError:
        return []
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and len(n.args) > 1]
    return [n for n in calls if getattr(n.func, 'id', '') == 'check']


def checks(cells):
    "The truth of every check(yours, truth), as text, and what is said to be equal to it."
    calls = [n for c in cells if c['cell_type'] == 'code' for n in calls_of_check(c)]
    return {ast.unparse(n.args[1]): ast.unparse(n.args[0]) for n in calls}


def exercises(page):
    "What follows the heading of a page."
    return parted(house.read(page))[1]


# ---- student edition


def student(out):
    "Copy the pages; nothing of the solutions, no outputs below the exercises."
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f'{out} is not empty; give a new folder')
    for page in [house.NBS / 'index.ipynb', *house.pages()]:
        notebook = house.read(page)
        for cell in parted(notebook)[1]:
            if cell['cell_type'] == 'code':
                cell['outputs'] = []
                cell['execution_count'] = None
        copy = out / 'nbs' / page.relative_to(house.NBS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + '\n')
    shutil.copytree(house.NBS / 'images', out / 'nbs' / 'images')
    shutil.copytree(house.ROOT / 'results', out / 'results')
    copied = len(list((out / 'nbs').rglob('*.ipynb')))
    print(
        f'{copied} pages, {sum(len(checks(exercises(p))) for p in pages().values())} checks: {out}'
    )


# ---- grades


def runnable(cells):
    "Code cells that a grader runs."
    return [c for c in cells if c['cell_type'] == 'code' and not NOT_HERE.search(house.text(c))]


def execute(before, theirs, folder, timeout):
    "Run the page's cells, then the student's; the student's with their outputs."
    import nbformat
    from nbclient import NotebookClient

    def fresh(cells):
        return [nbformat.v4.new_code_cell(house.text(c)) for c in cells]

    watch = nbformat.v4.new_code_cell(WATCH)
    first, last = fresh(before), fresh(theirs)
    notebook = nbformat.v4.new_notebook(cells=[*first, watch, *last])
    NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name='python3',
        allow_errors=True,
        resources=dict(metadata=dict(path=str(folder))),
    ).execute()
    return notebook.cells[len(first) + 1 :]


def is_honest(cell, wanted):
    "Whether a cell's checks compare an answer with the page's own truth."
    here = checks([cell])
    fair = all(truth in wanted and yours != truth for truth, yours in here.items())
    return fair and not CHEATS.search(house.text(cell))


def passed_in(cell, wanted):
    "How many checks a cell that has run earns."
    if not is_honest(cell, wanted):
        return 0
    printed = ''.join(''.join(o.get('text', '')) for o in cell['outputs'])
    return min(printed.count(PASSED), len(checks([cell])))


def errors_in(cells):
    "What stopped cells that have run."
    outputs = [o for c in cells for o in c['outputs'] if o['output_type'] == 'error']
    return [f'{o["ename"]}: {o["evalue"][:60]}' for o in outputs]


def new_words(theirs, given):
    "Words in a student's texts that the page does not have."
    old = {w for c in given if c['cell_type'] == 'markdown' for w in house.text(c).split()}
    texts = [house.text(c) for c in theirs if c['cell_type'] == 'markdown']
    return sum(word not in old for text in texts for word in text.split())


def last_line(error):
    "One line for an exception."
    lines = str(error).strip().splitlines()
    name = type(error).__name__
    return f'{name}: {lines[-1][:80]}' if lines else name


def grade(
    page,  # its path
    handed,  # the student's notebook, a dict
    timeout=300,  # seconds a cell may take
) -> Grade:
    "Judge one notebook."
    before, given = parted(house.read(page))
    _, theirs = parted(handed)
    wanted, got = checks(given), checks(theirs)
    mine = [c for c in theirs if c['cell_type'] == 'code' and 'cleanup()' not in house.text(c)]
    try:
        ran = execute(runnable(before), mine, page.parent, timeout)
    except Exception as error:
        return Grade(checks=len(wanted), remark=last_line(error))
    passed = sum(passed_in(cell, wanted) for cell in ran)
    remark = '; '.join(errors_in(ran))
    if not remark and not set(wanted) <= set(got):
        remark = 'a check is gone, or its truth was changed'
    words = new_words(theirs, given)
    return Grade(min(passed, len(wanted)), len(wanted), words, remark)


def grade_file(page, path):
    "Judge a file that may be no notebook."
    try:
        return grade(page, json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        wanted = checks(exercises(page))
        return Grade(checks=len(wanted), remark=f'not a notebook: {type(error).__name__}')


def grade_all(folder, out):
    "A line per student and page."
    book, rows = pages(), []
    students = sorted(p for p in Path(folder).iterdir() if p.is_dir())
    if not students:
        raise SystemExit(f'{folder} has no folders: expected one per student, with notebooks in it')
    for path in [path for s in students for path in sorted(s.rglob('*.ipynb'))]:
        who = path.relative_to(folder).parts[0]
        if path.name not in book:
            print(f'{who}: {path.name} is no page with exercises; passed over')
            continue
        mark = grade_file(book[path.name], path)
        rows.append((who, path.stem, *astuple(mark)))
        told = f'{mark.passed} of {mark.checks} checks, {mark.words} words  {mark.remark}'
        print(f'{who:20} {path.stem:20} {told}', flush=True)
    head = ('student', 'page', *(f.name for f in fields(Grade)))
    part = Path(out).with_suffix('.part')
    with open(part, 'w', newline='') as file:
        csv.writer(file).writerows([head, *rows])
    part.replace(out)
    print(out)


# ---- commands


def list_exercises():
    "The kinds of exercise on every page."
    for name, page in pages().items():
        cells = exercises(page)
        prose = '\n'.join(house.text(c) for c in cells if c['cell_type'] == 'markdown')
        tasks = re.findall(r'^\d\. \*\*(\w+)', prose, re.M)
        print(f'{name:28} {", ".join(tasks):24} {len(checks(cells))} checks')


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest='what', required=True)
    commands.add_parser('student').add_argument('out')
    grading = commands.add_parser('grade')
    grading.add_argument('folder')
    grading.add_argument('--out', default='grades.csv')
    commands.add_parser('list')
    given = parser.parse_args()
    if given.what == 'student':
        student(given.out)
    elif given.what == 'grade':
        grade_all(given.folder, given.out)
    else:
        list_exercises()


if __name__ == '__main__':
    main()
