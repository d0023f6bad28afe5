"""`spatialavatar0 gpu-check` on a GPU that is not there (tests/pretend.py): the whole command, a
part that fails, a run that is killed, tools that are missing, and what may not be in the report."""

import getpass
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gsplat
import pytest
import torch
from conftest import ROOT
from pretend import pretend_cuda

from spatialavatar0 import cli
from spatialavatar0.ground.core import InputError
from spatialavatar0.judge import gpu_check as page
from spatialavatar0.judge.gpu_check import PARTS, Part, gpu_check
from spatialavatar0.splats.renderers import _telling_line

SMALL = page.CheckSizes(
    gaussians=80,
    pixels=40,
    refine_steps=8,
    refine_pixels=48,
    refine_texels=24,
    speed_steps=3,
    speed_pixels=48,
    speed_texels=24,
    renders=3,
    presets=('tiny',),
)
NAMES = [part.name for part in PARTS]


@pytest.fixture
def gpu():
    with pretend_cuda() as there:
        yield there


@pytest.fixture
def tools(tmp_path, monkeypatch):
    "Programs that only say their version, of the CUDA that torch has."
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    says = {'nvcc': 'Cuda compilation tools, release 13.0, V13.0.88', 'ninja': '1.13.0'}
    folder = tmp_path / 'tools'
    folder.mkdir()
    for name, text in {**says, 'c++': 'c++ (GCC) 12.2.0'}.items():
        program = folder / name
        program.write_text(f'#!/bin/sh\necho "{text}"\n')
        program.chmod(0o755)
    monkeypatch.setenv('PATH', f'{folder}{os.pathsep}{os.environ["PATH"]}')
    return folder


@pytest.fixture
def cheap(gpu, tools, monkeypatch):
    "Parts that only note that they ran; -> their names, as they run."
    ran = []

    def part(name, needs):
        def run(sizes, device, say):
            ran.append(name)
            return {}

        return Part(name, run, needs)

    monkeypatch.setattr(page, 'PARTS', tuple(part(p.name, p.needs) for p in PARTS))
    monkeypatch.setattr(page, '_WORDS', {name: lambda found: '' for name in NAMES})
    return ran


def breaking(monkeypatch, name, error):
    "Let a part raise."

    def run(sizes, device, say):
        raise error

    parts = [p._replace(run=run) if p.name == name else p for p in page.PARTS]
    monkeypatch.setattr(page, 'PARTS', tuple(parts))


def quiet(text):
    pass


def statuses(report):
    return {name: entry['status'] for name, entry in report['parts'].items()}


def read(folder):
    return json.loads((folder / 'gpu_check.json').read_text())


def check_private(text):
    "No folder of this machine, no name of its user or of itself."
    assert str(ROOT) not in text and str(Path.home()) not in text
    assert not re.search(r'(?<![\w.])([A-Za-z]:)?[\\/~]\w', text)
    for name in (getpass.getuser(), platform.node()):
        assert not re.search(rf'(?<!\w){re.escape(name)}(?!\w)', text), name


# ---- the whole command


def test_the_whole_command(gpu, tools, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(page, 'quick_sizes', lambda: SMALL)
    code = cli.main(['gpu-check', '--quick', '--out', str(tmp_path / 'out')])
    said = capfd.readouterr().out
    report = read(tmp_path / 'out')
    assert statuses(report) == dict.fromkeys(NAMES, 'ok'), report['parts']
    assert code == 0 and 'gpu_check.json' in said
    assert all(re.search(rf'^{name} +[\d.]+  ok: ', said, re.M) for name in NAMES)
    check_private((tmp_path / 'out' / 'gpu_check.json').read_text())
    parts = report['parts']
    assert parts['toolchain']['gpu']['name'] == 'a pretended GPU'
    assert parts['toolchain']['tools'] == {'nvcc': '13.0', 'ninja': '1.13.0', 'c++': '12.2.0'}
    for name in ('parity', 'refine', 'speed', 'train'):
        assert parts[name]['rendered']['gsplat on cuda:0'] > 0, name
    assert set(parts['speed']['rendered']) == {'gsplat on cuda:0'}
    assert parts['speed']['refine_gib'] == 1.0
    assert set(parts['train']['rows']) == {'tiny fp32', 'tiny bf16'}
    losses = [row['loss'] for row in parts['train']['rows'].values()]
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]


def test_speed_waits_for_the_gpu(gpu):
    with gpu.watch() as seen:
        page.check_speed(SMALL)
    waits = sum(n for (kind, _), n in seen.waits.items() if kind == 'synchronize')
    assert waits == 8  # before and after: two configurations, and two kinds of pictures


def test_no_gpu(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    code = cli.main(['gpu-check', '--out', str(tmp_path / 'out')])
    err = capfd.readouterr().err
    assert code == 2 and err.count('\n') == 1
    assert 'there is no GPU to check: torch' in err  # page 00 has the reasons
    with pytest.raises(InputError, match='there is no GPU to check: torch'):
        gpu_check(tmp_path / 'out', SMALL, quiet)
    assert not (tmp_path / 'out').exists()


# ---- what goes wrong


def test_a_renderer_that_is_wrong_is_found(gpu, monkeypatch):
    right = gsplat.rasterization

    def darker(*args, **kwargs):
        colors, alphas, meta = right(*args, **kwargs)
        return colors * 0.999, alphas, meta

    assert page.check_parity(SMALL)['why'] == ''
    monkeypatch.setattr(gsplat, 'rasterization', darker)
    found = page.check_parity(SMALL)
    assert 'cpu RGB, cpu RGB+ED, dense RGB, dense RGB+ED' in found['why']
    assert 1e-4 < found['rows']['cpu RGB']['colors']['most'] < 2e-3


def test_a_gradient_that_is_wrong_is_found(gpu, monkeypatch):
    right = gsplat.rasterization

    def stiff(means, *args, **kwargs):
        return right(means.detach() + 0.99 * (means - means.detach()), *args, **kwargs)

    monkeypatch.setattr(gsplat, 'rasterization', stiff)
    row = page.check_parity(SMALL)['rows']['cpu RGB']
    assert row['grads']['means']['relative'] == pytest.approx(0.01, rel=1e-2)
    assert row['colors']['most'] < 1e-6 and not row['passed']


def test_a_refinement_that_drifts_is_found(gpu, monkeypatch):
    right = page.refine

    def drifting(start, train, device, **how):
        end, log = right(start, train, device=device, **how)
        if device == 'cuda':
            end = replace(end, splats=dict(end.splats, sh0=end.splats['sh0'] + 0.2))
        return end, log

    monkeypatch.setattr(page, 'refine', drifting)
    found = page.check_refine(SMALL)
    assert found['why'] == 'CPU and GPU end more than 0.1 dB apart: paper, ours'


def test_a_part_that_fails_is_one_line(cheap, tmp_path, capfd, monkeypatch):
    private = f'{Path.home()}/x/y.cu(3): error\nby {getpass.getuser()} on {platform.node()}'
    breaking(monkeypatch, 'refine', RuntimeError(private))
    assert cli.main(['gpu-check', '--out', str(tmp_path)]) == 1
    parts = read(tmp_path)['parts']
    assert parts['refine'] == dict(status='failed', why='RuntimeError: y.cu(3): error by ? on ?')
    assert [p['status'] for n, p in parts.items() if n != 'refine'] == ['ok'] * 5
    check_private((tmp_path / 'gpu_check.json').read_text())
    assert re.search(r'^refine +failed: RuntimeError: y\.cu', capfd.readouterr().out, re.M)


def test_missing_tools(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gsplat.cuda._backend, '_C', None)
    monkeypatch.setenv('PATH', '/nowhere')
    monkeypatch.setenv('CUDA_HOME', '/nowhere')
    parts = gpu_check(tmp_path, SMALL, quiet)['parts']
    assert parts['toolchain']['status'] == parts['build']['status'] == 'failed'
    for name in ('toolchain', 'build'):
        assert 'nvcc is missing (pip install nvidia-cuda-nvcc' in parts[name]['why']
    for name in NAMES[2:]:
        assert parts[name] == dict(status='left out', why='it needs build')


def test_the_line_of_a_compiler_that_says_why():
    pages = "Error building extension 'x': [1/9] nvcc -c a\nFAILED: a.o\n{}\nninja: stopped"
    for line in ('a.cu(7): error: no such thing', 'nvcc fatal   : Unsupported gpu architecture'):
        assert _telling_line(pages.format(line)) == ' '.join(line.split())
    assert _telling_line('torch and nvcc\ndiffer').startswith('torch and nvcc differ')


def test_too_little_memory_is_no_failure(gpu, monkeypatch):
    def full(self):
        raise InputError('no memory on the GPU for a batch of 2 in one part')

    monkeypatch.setattr(page.Trainer, 'step', full)
    found = page.check_train(SMALL, say=quiet)
    assert found['why'] == ''
    assert [row['status'] for row in found['rows'].values()] == ['left out'] * 2


def test_a_training_that_breaks_is_a_failure(gpu, monkeypatch):
    def breaks(self):
        raise InputError('l1 became nan or inf: person 0')

    monkeypatch.setattr(page.Trainer, 'step', breaks)
    assert 'tiny bf16: l1 became nan' in page.check_train(SMALL, say=quiet)['why']


# ---- stopped, and gone on with


def test_goes_on_where_it_was_stopped(cheap, tmp_path, monkeypatch):
    whole = page.PARTS
    breaking(monkeypatch, 'speed', KeyboardInterrupt())
    monkeypatch.setattr(page, 'quick_sizes', lambda: SMALL)
    assert cli.main(['gpu-check', '--quick', '--out', str(tmp_path)]) == 130
    assert statuses(read(tmp_path)) == dict.fromkeys(NAMES[:4], 'ok')
    monkeypatch.setattr(page, 'PARTS', whole)
    cheap.clear()
    gpu_check(tmp_path, SMALL, quiet)
    assert cheap == ['speed', 'train']
    assert statuses(read(tmp_path)) == dict.fromkeys(NAMES, 'ok')
    gpu_check(tmp_path, SMALL, quiet, restart=True)
    assert cheap == ['speed', 'train', *NAMES]


KILLED = """
import os, sys
from pretend import pretend_cuda
from spatialavatar0.judge import gpu_check as page
from test_gpu_check import SMALL, quiet

def run(sizes, device, say):
    return {}

def dies(sizes, device, say):
    os._exit(9)

page._WORDS = {part.name: lambda found: '' for part in page.PARTS}
page.PARTS = tuple(p._replace(run=dies if p.name == 'refine' else run) for p in page.PARTS)
page.torch.version.cuda = '13.0'
with pretend_cuda():
    page.gpu_check(sys.argv[1], SMALL, quiet)
"""


def test_a_part_that_ends_the_process(cheap, tmp_path):
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / 'tests')]))

    def killed():
        command = [sys.executable, '-c', KILLED, str(tmp_path)]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    assert killed().returncode == 9
    ok = dict.fromkeys(NAMES[:3], 'ok')
    assert statuses(read(tmp_path)) == dict(ok, refine='started')
    assert killed().returncode == 9  # now it came last
    ok = dict.fromkeys([name for name in NAMES if name != 'refine'], 'ok')
    assert statuses(read(tmp_path)) == dict(ok, refine='started')
    parts = gpu_check(tmp_path, SMALL, quiet)['parts']
    assert cheap == [] and parts['refine']['status'] == 'failed'
    assert 'the process ended in this part, 2 times' in parts['refine']['why']


def test_a_gpu_that_answers_no_more(cheap, tmp_path, monkeypatch):
    breaking(monkeypatch, 'parity', RuntimeError('CUDA error: an illegal memory access'))
    monkeypatch.setattr(page, 'gpu_answers', lambda: False)
    first = gpu_check(tmp_path, SMALL, quiet)['parts']
    assert cheap == ['toolchain', 'build']
    assert all('no longer answers' in first[name]['why'] for name in NAMES[3:])
    gpu_check(tmp_path, SMALL, quiet)
    assert cheap == ['toolchain', 'build', 'refine', 'speed', 'train']
    assert statuses(read(tmp_path)) == dict(dict.fromkeys(NAMES, 'ok'), parity='failed')


def test_other_work_is_refused(cheap, tmp_path, monkeypatch):
    gpu_check(tmp_path, SMALL, quiet)
    with pytest.raises(InputError, match='refine_steps .*changed; give another --out'):
        gpu_check(tmp_path, replace(SMALL, refine_steps=9), quiet)
    monkeypatch.setattr(torch, '__version__', '9.9')
    with pytest.raises(InputError, match='torch .*now 9.9'):
        gpu_check(tmp_path, SMALL, quiet)
    gpu_check(tmp_path, SMALL, quiet, restart=True)
    assert read(tmp_path)['made_of']['torch'] == '9.9'


@pytest.mark.parametrize('text', ['{', '[]', '{"parts": 3}', '{"parts": {"speed": 1}}'])
def test_a_report_that_is_none(cheap, tmp_path, text):
    (tmp_path / 'gpu_check.json').write_text(text)
    with pytest.raises(InputError, match='no report of gpu-check|not readable JSON'):
        gpu_check(tmp_path, SMALL, quiet)
    assert cheap == []


def test_a_file_of_ones_own_name(cheap, tmp_path):
    gpu_check(tmp_path / 'mine.json', SMALL, quiet)
    assert statuses(json.loads((tmp_path / 'mine.json').read_text()))['train'] == 'ok'
