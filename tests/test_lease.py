"One folder, one writer: leases, locks, signals, what a killed run leaves."

import contextlib
import errno
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
from conftest import ROOT

from spatialavatar0 import cli
from spatialavatar0.avatar.avatar import new_avatar
from spatialavatar0.capture.film import _forget, _fresh
from spatialavatar0.ground.core import InputError, atomic_path
from spatialavatar0.ground.lease import LEASE, finish_first, lease, locked, sweep
from spatialavatar0.head.head import open_head
from spatialavatar0.judge.results import Line, Results
from spatialavatar0.pictures.clips import remove_clip, write_vhap
from spatialavatar0.pictures.people import make_person, mono_clip
from spatialavatar0.stage1.generator import from_preset
from spatialavatar0.stage1.trainer import Shelf
from spatialavatar0.use.animate import write_film
from spatialavatar0.use.export import write_sequence

pytestmark = pytest.mark.skipif(os.name == 'nt', reason='locks and signals of POSIX')
HOLD = """
import sys
from spatialavatar0.ground.lease import lease
with lease(sys.argv[1]):
    print('in', flush=True)
    sys.stdin.read()
"""


def started(code, *words):
    "A process of its own that has said its first line."
    command = [sys.executable, '-c', code, *map(str, words)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, **pipes)
    process.first = process.stdout.readline().strip()
    return process


@contextlib.contextmanager
def held(folder):
    "A folder that another process is writing."
    process = started(HOLD, folder)
    assert process.first == 'in'
    yield process
    process.communicate('')


def is_gone(pid, seconds=30):
    "Whether a process ends, or has ended."
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            state = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
        except OSError:
            return True
        if state == 'Z':
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope='module')
def at(tmp_path_factory):
    "A small person, and an avatar."
    home = tmp_path_factory.mktemp('inputs')
    write_vhap(mono_clip(make_person(0), 8, 64), home / 'people' / 'ada')
    new_avatar(open_head(), 16).save(home / 'avatar.safetensors')
    return home


# ---- the lease

WRITERS = dict(
    build='build {at}/nobody.png --out {out}',
    film='build {at}/nobody.mp4 --out {out}',
    track='track {at}/nobody.mp4 --out {out}',
    refine='refine new {at}/people/ada --out {out}',
    train='train --out {out}',
    sequence='export {at}/avatar.safetensors {out} --motion blink --seconds .2',
    theirs='export {at}/avatar.safetensors {out} --gaussian-avatars',
)


@pytest.mark.parametrize('name', WRITERS)
def test_second_command_is_refused_in_one_line(name, at, tmp_path, capfd):
    out = tmp_path / 'out'
    words = WRITERS[name].format(at=at, out=out).split()
    with held(out) as first:
        code = cli.main(words)
        assert [path.name for path in out.iterdir()] == [LEASE]
    said = capfd.readouterr().err.strip().splitlines()
    assert code == 1
    assert len(said) == 1
    since = r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d'
    assert re.search(f'written by process {first.pid} on .* since {since} \\(.*\\)', said[0])
    assert platform.node() in said[0]
    assert 'wait until it has ended, or choose another --out' in said[0]
    assert not out.exists()


def test_second_benchmark_is_refused(at, tmp_path, capfd):
    out = tmp_path / 'r.jsonl'
    words = 'benchmark', at / 'people', '--protocol', 'last:2', '--method', 'warp', '--out', out
    with held(tmp_path / 'r_states') as first:
        assert cli.main([str(word) for word in words]) == 1
    assert f'written by process {first.pid}' in capfd.readouterr().err
    assert not out.exists()


def test_a_killed_holder_is_no_holder(tmp_path):
    process = started(HOLD, tmp_path / 'out')
    with pytest.raises(InputError, match=f'process {process.pid} '), lease(tmp_path / 'out'):
        pass
    process.kill()
    process.communicate()
    assert (tmp_path / 'out' / LEASE).exists()
    with lease(tmp_path / 'out'), lease(tmp_path / 'out' / '..' / 'out'):
        pass
    assert not list((tmp_path / 'out').iterdir())


COUNT = """
import sys
from pathlib import Path
from spatialavatar0.ground.lease import lease
print('in', flush=True)
done = 0
while done < 40:
    try:
        with lease(sys.argv[1]):
            count = Path(sys.argv[2])
            count.write_text(str(int(count.read_text()) + 1))
            done += 1
    except ValueError:
        pass
"""


def test_never_two_holders(tmp_path):
    "The file comes and goes with every holder; none is let in by a file that has just gone."
    count = tmp_path / 'count'
    count.write_text('0')
    jobs = [started(COUNT, tmp_path / 'out', count) for _ in range(3)]
    assert [job.communicate()[1] for job in jobs] == [''] * 3
    assert count.read_text() == '120'
    assert [path.name for path in tmp_path.iterdir()] == ['count']


def test_a_lease_writes_through_no_link(tmp_path):
    (tmp_path / 'letter').write_text('dear')
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / LEASE).symlink_to(tmp_path / 'letter')
    with pytest.raises(OSError), lease(tmp_path / 'out'):
        pass
    assert (tmp_path / 'letter').read_text() == 'dear'


def test_words_of_a_holder_reach_no_terminal(tmp_path):
    with held(tmp_path) as first:
        about = json.loads((tmp_path / LEASE).read_text())
        (tmp_path / LEASE).write_text(json.dumps(about | dict(command='\x1b[2J\nok')))
        with pytest.raises(InputError) as refused, lease(tmp_path):
            pass
    assert f'process {first.pid}' in str(refused.value)
    assert not set(str(refused.value)) & {'\x1b', '\n'}


@pytest.mark.parametrize('locks', ['none', 'refused'])
def test_a_system_without_locks_says_so(locks, tmp_path, monkeypatch):
    "Windows has no fcntl; some network drives have no locks."
    module = sys.modules[lease.__module__]
    if locks == 'none':
        monkeypatch.setattr(module, 'fcntl', None)
    else:
        monkeypatch.setattr(module.fcntl, 'flock', no_lock)
    for hold in (lease(tmp_path / 'out'), locked(tmp_path / 'r.jsonl')):
        with pytest.warns(UserWarning, match='no second command writes'), hold:
            (tmp_path / 'out').mkdir(exist_ok=True)


def no_lock(*_):
    raise OSError(errno.ENOLCK, 'No locks available')


# ---- results


def forked(work):
    "The exit code of a fork that does some work: 0, or 7 if it was refused."
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except InputError:
        os._exit(7)
    finally:
        os._exit(1)


def waited(pids):
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def line(subject, seed=0):
    names = dict(method='m', protocol='p', subject=subject, driver=subject)
    return Line(**names, seed=seed, scores=dict(psnr=1.0))


def test_results_of_several_processes(tmp_path):
    book = Results(tmp_path / 'r.jsonl')  # all have read it before the first one writes

    def add(name):
        for seed in range(15):
            book.add(line(name, seed))

    assert waited([forked(lambda n=n: add(n)) for n in 'abcd']) == [0] * 4
    kept = Results(book.path).lines
    assert {(one.subject, one.seed) for one in kept} == {(n, i) for n in 'abcd' for i in range(15)}
    assert len(kept) == 60
    assert [path.name for path in tmp_path.iterdir()] == ['r.jsonl']


def test_one_line_of_a_key(tmp_path):
    book = Results(tmp_path / 'r.jsonl')
    codes = waited([forked(lambda: book.add(line('ada'))) for _ in range(4)])
    assert sorted(codes) == [0, 7, 7, 7]
    assert len(Results(book.path).lines) == 1


def test_a_lock_leaves_nothing(tmp_path):
    with locked(tmp_path / 'r.jsonl'), locked(tmp_path / 'r.jsonl'):
        pass
    assert not list(tmp_path.iterdir())
    (tmp_path / 'file').touch()
    with pytest.raises(InputError, match='choose another --out'), locked(tmp_path / 'file' / 'r'):
        pass


def test_two_films_of_one_name_do_not_mix(tmp_path):
    def film(shade):
        write_film(np.full((12, 32, 32, 3), shade, np.uint8), tmp_path / 'film.gif', 10)

    assert waited([forked(lambda s=shade: film(s)) for shade in (40, 200)]) == [0, 0]
    shades = {int(frame[..., 0].mean()) for frame in imageio.mimread(tmp_path / 'film.gif')}
    assert len(shades) == 1
    assert [path.name for path in tmp_path.iterdir()] == ['film.gif']


# ---- litter


def test_litter_of_killed_runs_goes(tmp_path):
    gone = started('print(1)')
    gone.communicate()
    with atomic_path(tmp_path / 'film.mp4') as mine:
        mine.touch()
        dead = mine.with_name(mine.name.replace(f'-{os.getpid()}.', f'-{gone.pid}.'))
        far = mine.with_name(re.sub('[0-9a-f]{8}-', '0badc0de-', dead.name))
        own = tmp_path / '.holiday.part'
        for path in (dead, far, own):
            path.touch()
        sweep(tmp_path)
        assert mine.exists() and far.exists() and own.exists()
        assert not dead.exists()


def litter(folder, name):
    "An unfinished file of a process that is gone."
    gone = started('print(1)')
    gone.communicate()
    with atomic_path(folder / name) as mine:
        mine.touch()
        dead = mine.with_name(mine.name.replace(f'-{os.getpid()}.', f'-{gone.pid}.'))
    (folder / name).rename(dead)
    return dead


def test_litter_among_looks_goes(tmp_path):
    dead = litter(tmp_path / 'looks', 'looks.json')
    Shelf([mono_clip(make_person(0), 8, 64)[:1]], from_preset('tiny'), tmp_path / 'looks')
    assert not dead.exists()


@pytest.mark.parametrize('name', ['view', 'animate', 'export'])
def test_the_same_command_removes_its_litter(name, at, tmp_path, capfd):
    litter(tmp_path, 'letter')
    words = dict(
        view=('--out', tmp_path / 'a.html'),
        animate=('blink', '--out', tmp_path / 'a.gif', '--size', 32, '--seconds', 0.1),
        export=(tmp_path / 'a.splat',),
    )
    assert cli.main([name, str(at / 'avatar.safetensors'), *map(str, words[name])]) == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_hidden_files_are_no_files_of_others(at, tmp_path):
    (tmp_path / LEASE).touch()
    clip = mono_clip(make_person(0), 8, 64)
    write_vhap(clip[:2], tmp_path)
    assert (tmp_path / 'transforms.json').exists()
    (tmp_path / 'motion').mkdir()
    (tmp_path / 'motion' / LEASE).touch()
    write_sequence(new_avatar(open_head(), 16), [{}], tmp_path / 'motion')
    assert (tmp_path / 'motion' / 'frame_00000.ply').exists()


# ---- killed between two writes


class Killed(BaseException):
    "What no code answers."


def interrupted_at(n, monkeypatch, work, name='replace'):
    "Do some work until the n-th file gets its final name, or goes; whether it came so far."
    call, count = getattr(os, name), 0

    def counted(*words):
        nonlocal count
        count += 1
        if count == n:
            raise Killed
        call(*words)

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(os, name, counted)
        work()
        return False
    return True


def test_a_clip_and_its_report_are_whole_together(tmp_path, monkeypatch):
    "Whenever transforms.json says that a folder is whole, what was to come with it is there."
    clip = mono_clip(make_person(0), 8, 64)[:2]
    n = 1
    while True:
        folder = tmp_path / str(n)

        def work(folder=folder):
            write_vhap(clip, folder, more={'tracking.json': '{}'})

        if not interrupted_at(n, monkeypatch, work):
            break
        whole = (folder / 'transforms.json').exists()
        assert not whole or (folder / 'tracking.json').exists()
        work()
        assert (folder / 'tracking.json').exists()
        assert not (folder / 'writing.jsonl').exists()
        n += 1
    assert n > 6


@pytest.mark.parametrize('name', ['unlink', 'rmdir'])
def test_a_removal_goes_on(name, tmp_path, monkeypatch):
    "Whatever was removed before a kill, the rest is still known as ours."
    clip = mono_clip(make_person(0), 8, 64)[:2]
    n = 1
    while True:
        folder = tmp_path / f'{name}{n}'
        write_vhap(clip, folder, more={'tracking.json': '{}'})

        def work(folder=folder):
            remove_clip(folder, 'tracking.json')

        came = interrupted_at(n, monkeypatch, work, name)
        work()
        assert not list(folder.iterdir()), n
        if not came:
            break
        n += 1
    assert n > 3


def test_the_folder_of_a_tracking(tmp_path, monkeypatch):
    "A beginning that was cut off before its name was written, and an end that was cut off."
    work = tmp_path / 'clip.tracking'
    key, other = dict(film='0' * 16), dict(film='f' * 16)
    assert interrupted_at(1, monkeypatch, lambda: _fresh(work, key))
    assert not (work / 'about.json').exists()
    (work / '.about.0badc0de-1.part.json').touch()
    _fresh(work, key)
    assert json.loads((work / 'about.json').read_text()) == key
    (work / 'faces').touch()
    with pytest.raises(InputError, match='the film'):
        _fresh(work, other)
    _forget(work, other)
    assert (work / 'faces').exists()
    _forget(work, key)
    work.mkdir()
    _forget(work, key)
    assert not work.exists()


# ---- signals


def send_in_a_step(number):
    "Send this process a signal once it takes steps that are finished first."

    def wait():
        while 'finish_first' not in getattr(signal.getsignal(number), '__qualname__', ''):
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_refinement_that_is_asked_to_end(number, code, at, tmp_path, capfd):
    before = signal.getsignal(signal.SIGTERM)
    send_in_a_step(number)
    words = 'refine', 'new', at / 'people' / 'ada', '--out', tmp_path, '--iters', 10**6
    ended = cli.main([str(word) for word in (*words, '--resolution', 16)])
    out, err = capfd.readouterr()
    assert ended == code
    assert 'the same call goes on from' in out
    assert err.strip().splitlines()[-1].startswith('interrupted')
    files = {path.name for path in tmp_path.iterdir() if not path.name.startswith('.')}
    assert files == {'start.safetensors', 'state.safetensors'}
    assert signal.getsignal(signal.SIGTERM) == before


IDLE = """
import sys, time
from spatialavatar0.ground.lease import as_ctrl_c, exit_code
with as_ctrl_c() as came:
    try:
        print('in', flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print('tidying up', flush=True)
        time.sleep(float(sys.argv[1]))
sys.exit(exit_code(came))
"""
ENDS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize('number, code', ENDS)
def test_exit_codes(number, code):
    process = started(IDLE, 0)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == code


def test_a_second_signal_ends_at_once():
    process = started(IDLE, 60)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == 'tidying up\n'
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT


def test_what_is_ignored_stays_ignored():
    "As under nohup."
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with finish_first() as flag:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
        assert not flag
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- all of it


def test_short_fuzz():
    "Kills and races of real commands, to the last byte; the long form: benchmarks/kill_fuzz.py."
    words = [sys.executable, ROOT / 'benchmarks' / 'kill_fuzz.py', '--short']
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith(': 0 faults')
