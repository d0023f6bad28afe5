"""One test per notebook, by the rules of nbdev_test, within the time it states; exported code in
step with the pages; pages clean."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / 'tools'))
import statistics_of_pages as stats

PAGES = sorted(
    p
    for p in (ROOT / 'nbs').rglob('*.ipynb')
    if not any(part.startswith(('_', '.')) for part in p.relative_to(ROOT).parts)
)


def run_page(page, *on):
    "Whether a page's cells run, by the rules of nbdev_test; `on`: flags not to skip."
    from nbdev.config import get_config
    from nbdev.test import test_nb

    if torch.cuda.is_available():
        on += ('cuda',)
    return test_nb(
        page,
        skip_flags=set(get_config(path=ROOT).tst_flags.split()) - set(on),
        force_flags=list(on),
        basepath=ROOT,
    )[0]


@pytest.mark.parametrize(
    'page', PAGES, ids=lambda p: str(p.relative_to(ROOT / 'nbs').with_suffix(''))
)
def test_notebook(page, page_times):
    start = time.perf_counter()
    budget = stats.budget(json.loads(page.read_text()))
    if '"#| fresh' not in page.read_text():
        assert run_page(page), f'{page.name} failed (its traceback is in the captured stderr)'
    else:  # it forks, which only a process without threads can
        code = (
            'import sys; from pathlib import Path; from test_notebooks import run_page; '
            f'sys.exit(not run_page(Path({str(page)!r}), "fresh"))'
        )
        done = subprocess.run(
            [sys.executable, '-c', code], cwd=ROOT / 'tests', capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    seconds = page_times[str(page.relative_to(ROOT / 'nbs').with_suffix(''))] = round(
        time.perf_counter() - start, 1
    )
    assert not budget or seconds < 3 * budget + 30, (
        f'{page.name} says it runs in {budget} s, and took {seconds} (a slower machine may have '
        'three times that, and half a minute)'
    )


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the source, to export and clean in."
    dst = tmp_path_factory.mktemp('copy')
    for name in ('nbs', 'spatialavatar0'):
        shutil.copytree(
            ROOT / name,
            dst / name,
            ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'assets', '_proc'),
        )
    for name in ('settings.ini', 'pyproject.toml'):
        shutil.copy(ROOT / name, dst)
    return dst


def run(code, folder):
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    subprocess.run([sys.executable, '-c', code], cwd=folder, env=env, check=True)


def differences(a, b, suffix):
    "Names of files that are not the same in both folders."
    files = [
        {
            p.relative_to(d): p.read_bytes()
            for p in d.rglob(f'*{suffix}')
            if not {'__pycache__', '.ipynb_checkpoints'} & set(p.parts)
        }
        for d in (a, b)
    ]
    return sorted(
        str(n) for n in files[0].keys() | files[1].keys() if files[0].get(n) != files[1].get(n)
    )


def test_exported_in_step(copy):
    for p in (copy / 'spatialavatar0').rglob(
        '*.py'
    ):  # from nothing, so that a module whose page is gone shows up, too
        if p.name != '__init__.py':
            p.unlink()
    run('from nbdev.doclinks import nbdev_export; nbdev_export()', copy)
    assert not differences(copy / 'spatialavatar0', ROOT / 'spatialavatar0', '.py'), (
        'run nbdev_export and commit'
    )


def test_notebooks_clean(copy):
    run('from nbdev.clean import nbdev_clean; nbdev_clean()', copy)
    assert not differences(copy / 'nbs', ROOT / 'nbs', '.ipynb'), 'run nbdev_clean and commit'
