"""Where hostile files are read: a process for every case, watched for time, memory and traces."""

import argparse
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS, MEGABYTES = int(os.environ.get('STRANGERS', 20)), 2000  # a case may take so much
LONGEST = 1100  # characters of a line
CANARY = 'CANARY'  # what a payload tries to make in the folder of its case
REFUSED, WARNED, HARMLESS = 'refused', 'warned', 'harmless'
SOUND = 'sound'  # no threat: shows that a door opens for what is right
THREATS = dict(
    code='runs what a stranger wrote',
    bomb='is small on disk and large, or endless, when read',
    path='leads elsewhere: out of the folder, to a device, in a circle',
    text='brings control characters, markup, or no text at all',
    number='is NaN, endless, negative, or beyond 64 bits',
    kind='is something else than it should be',
    cut='breaks off, or is bent',
    race='changes while it is read',
)
GROUPS = 'arrays', 'ours', 'folders', 'pictures', 'splats', 'performances', 'doors'


@dataclass(frozen=True)
class Case:
    "One hostile input, and the door it knocks at."

    file: str  # what kind of file it is
    threat: str  # one of THREATS
    what: str  # what is hostile about it
    make: Callable  # (empty folder) -> what the door is given
    read: Callable  # the door
    want: str = REFUSED  # or WARNED, HARMLESS
    check: Callable = None  # of what the door returned: what is wrong with it, '' if nothing

    @property
    def name(self):
        return f'{self.file}: {self.what}'


@dataclass
class Row:
    "What came of a case."

    file: str
    threat: str
    what: str
    ends: str  # refused, warned, harmless, or what is wrong
    says: str  # the program's own line
    seconds: float = 0.0
    megabytes: float = 0.0

    @property
    def name(self):
        return f'{self.file}: {self.what}'


class Says(Exception):
    "What a command said on its way out with exit code 1."


def cases():
    "All cases, in the order of the groups."
    found = []
    for group in GROUPS:
        found += importlib.import_module(f'strangers.{group}').CASES
    names = [case.name for case in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f'two cases are called {min(twice)}')
    return found


# ---- what a line may look like


def unprintable(text):
    "Characters that a terminal obeys, or that hide what is written."
    kinds = 'Cc', 'Cf', 'Cs', 'Co', 'Zl', 'Zp'
    return [c for c in text if unicodedata.category(c) in kinds]


def wrong_with(line):
    "What is wrong with a line of the program; '' if nothing is."
    if '\n' in line:
        return 'more than one line'
    if found := unprintable(line):
        return f'prints {found[0]!r}'
    if len(line) > LONGEST:
        return f'a line of {len(line):,} characters'
    if len(line.split()) < 4:
        return 'a line that explains nothing'
    return ''


# ---- traces


def tree(folder):
    "What lies in a folder, without following links: path -> size and time."
    found = {}
    for top, names, files in os.walk(folder):
        for name in [*names, *files]:
            path = os.path.join(top, name)
            about = os.lstat(path)
            is_folder = name in names and not os.path.islink(path)
            found[path] = None if is_folder else (about.st_size, about.st_mtime_ns)
    return found


def traces(before, after, place):
    "What a door left outside of out; '' if nothing."
    if str(place / CANARY) in after:
        return 'RAN CODE'
    changed = {p for p in {*before, *after} if before.get(p, 0) != after.get(p, 0)}
    inside = str(place / 'out')
    kept = inside, str(place / 'home' / '.cache')  # results; hashes of what was read
    outside = sorted(
        p for p in changed if not (p + os.sep).startswith(tuple(k + os.sep for k in kept))
    )
    return f'WROTE {os.path.relpath(outside[0], place)}' if outside else ''


def peak(reset=False):
    "The most memory this process held since the last reset, megabytes."
    if reset:
        Path('/proc/self/clear_refs').write_text('5')
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) / 1024


# ---- inside the process of a case


def answer(case, given):
    "How the door ends, and what it says."
    from spatialavatar0.ground.core import InputError

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        warnings.simplefilter('ignore', DeprecationWarning)
        warnings.simplefilter('ignore', ResourceWarning)
        try:
            result = case.read(given)
        except (InputError, Says) as error:
            return REFUSED, str(error)
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f'{Path(place.filename).name}:{place.lineno}'
            return 'TRACEBACK', f'{type(error).__name__} at {where}: {str(error)[:200]}'
    if case.check and (wrong := case.check(result)):
        return f'WRONG {wrong}', ''
    if caught:
        return WARNED, str(caught[-1].message)
    return HARMLESS, ''


def judged(case, ends, says):
    "An ending is what was wanted, or it is named in capitals."
    if ends in (REFUSED, WARNED) and (wrong := wrong_with(says)):
        return f'UNPRINTABLE {wrong}'
    if ends == HARMLESS != case.want:
        return 'SILENT'
    if ends in (REFUSED, WARNED) and ends != case.want:
        return f'{ends.upper()} INSTEAD'
    return ends


def settle(place):
    "A place of its own: home, temporary files, working folder."
    for name in ('in', 'here', 'tmp', 'home/.cache'):
        (place / name).mkdir(parents=True)
    os.environ.update(HOME=str(place / 'home'), TMPDIR=str(place / 'tmp'))
    tempfile.tempdir = None
    os.chdir(place / 'here')


def quiet(place):
    "What libraries print goes to files, whatever language they are written in."
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        file = os.open(place / 'out' / f'.printed{number}', os.O_CREAT | os.O_RDWR)
        os.dup2(file, number)


def live(case, place, pipe):
    "The life of a case's process."
    settle(place)
    (place / 'out').mkdir()
    quiet(place)
    os.setsid()
    given = case.make(place / 'in')
    before = tree(place)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.write(b'ready\n')
    pipe.flush()
    start, held = time.perf_counter(), peak(reset=True)
    ends, says = answer(case, given)
    seconds, megabytes = time.perf_counter() - start, max(0, peak() - held)
    found = traces(before, tree(place), place)
    ends = found or judged(case, ends, says)
    says = says.replace(f'{place}/', '')
    row = Row(case.file, case.threat, case.what, ends, says, round(seconds, 2), round(megabytes))
    pipe.write(json.dumps(asdict(row)).encode() + b'\n')
    pipe.flush()


# ---- outside


def held_by(pid):
    "Memory of a process now, megabytes."
    try:
        pages = int(Path(f'/proc/{pid}/statm').read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * resource.getpagesize() / 2**20


def watch(pid, reader, base):
    "Why a process had to be ended, and what it wrote; '' if it ended by itself."
    os.set_blocking(reader.fileno(), False)
    said, start, most = b'', time.perf_counter(), base
    while True:
        part = reader.read()
        if part == b'':
            return '', said, most
        said += part or b''
        if part and said == b'ready\n':
            start = time.perf_counter()
        most = max(most, held_by(pid))
        allowed = SECONDS if said.startswith(b'ready') else 3 * SECONDS
        if time.perf_counter() - start > allowed:
            return f'TOO SLOW over {SECONDS} s', said, most
        if most - base > MEGABYTES:
            return f'TOO LARGE over {MEGABYTES} MB', said, most
        time.sleep(0.002)


def begin(case, place):
    "Fork: the pid of the case's process, and what it will write."
    out, into = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(into)
        return pid, os.fdopen(out, 'rb', 0)
    os.close(out)
    try:
        live(case, place, os.fdopen(into, 'wb'))
    except BaseException:
        Path(place, 'lost').write_text(traceback.format_exc())
    os._exit(0)


def stop(pid):
    "End a case's process, and what it started."
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
    os.waitpid(pid, 0)


def run_case(case, keep=False):
    "One case in a process of its own."
    place = Path(tempfile.mkdtemp(prefix='stranger-'))
    place.chmod(0o755)
    try:
        base = held_by(os.getpid())
        pid, reader = begin(case, place)
        bad, said, most = watch(pid, reader, base)
        reader.close()
        stop(pid)
        lines = said.decode().splitlines()
        if len(lines) == 2:
            return Row(**json.loads(lines[1]))
        lost = place / 'lost'
        why = lost.read_text()[-600:] if lost.exists() else ''
        ends = bad or ('LOST' if why else 'KILLED')
        return Row(case.file, case.threat, case.what, ends, why, SECONDS, round(most - base))
    finally:
        if not keep:
            shutil.rmtree(place, ignore_errors=True)


def is_good(row):
    return row.ends in (REFUSED, WARNED, HARMLESS)


def prepare(groups=GROUPS):
    "One thread, all modules that doors need, and sound files, before the first case."
    from strangers.make import samples

    os.environ.update(OMP_NUM_THREADS='1', NUMBA_NUM_THREADS='1')
    sys.path[:0] = [str(ROOT / 'tests'), str(ROOT / 'tools')]
    for name in ('torch', 'PIL.Image', 'lmdb', 'scipy.sparse', 'imageio_ffmpeg', 'scipy.io'):
        importlib.import_module(name)
    for name in ('cli', 'pipeline', 'use.viewer', 'stage1.trainer', 'judge.benchmark'):
        importlib.import_module(f'spatialavatar0.{name}')
    import torch

    torch.set_num_threads(1)
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imports more than it seems
    warnings.simplefilter('ignore')
    samples()
    if pid := os.fork():  # what makes sound files may leave threads behind, and dies with them
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError('the sound files could not be made')
        for group in groups:
            getattr(importlib.import_module(f'strangers.{group}'), 'warm', list)()
        return
    try:
        for group in groups:
            getattr(importlib.import_module(f'strangers.{group}'), 'prepare', list)()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def matching(found, words):
    "Cases whose line has all these words."
    return [case for case in found if all(w in f'{case.threat} {case.name}' for w in words)]


def some(found):
    "The first of every file and threat, and every fifth of the rest."
    seen, chosen = set(), []
    for i, case in enumerate(found):
        pair = case.file, case.threat
        if pair not in seen or i % 5 == 0:
            chosen.append(case)
        seen.add(pair)
    return chosen


def show(row):
    mark = ' ' if is_good(row) else '!'
    numbers = f'{row.seconds:5.2f} s {row.megabytes:5.0f} MB'
    print(f'{mark} {row.ends:10.40} {row.threat:6} {numbers} {row.name}: {row.says[:220]!r}')


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('words', nargs='*')
    parser.add_argument('--out', help='file for the rows (.json)')
    parser.add_argument('--some', action='store_true', help='what the suite runs')
    parser.add_argument('--part', help='one of n parts of all cases, as 0/2')
    parser.add_argument('--group', help='one of GROUPS')
    parser.add_argument('--bad', action='store_true', help='show only what is wrong')
    options = parser.parse_args()
    prepare([options.group] if options.group else GROUPS)
    rows = []
    chosen = (
        importlib.import_module(f'strangers.{options.group}').CASES if options.group else cases()
    )
    chosen = matching(some(chosen) if options.some else chosen, options.words)
    if options.part:
        first, step = map(int, options.part.split('/'))
        chosen = chosen[first::step]
    for case in chosen:
        rows.append(run_case(case))
        if not options.bad or not is_good(rows[-1]):
            show(rows[-1])
    bad = [row for row in rows if not is_good(row)]
    took = sum(row.seconds for row in rows)
    print(f'{len(rows)} cases, {len(bad)} of them wrong; {took:.0f} s of reading')
    if options.out:
        lines = ',\n'.join(json.dumps(asdict(row)) for row in rows)
        content = f'[\n{lines}\n]'
        Path(options.out).write_text(content + '\n')
    return bool(bad)


if __name__ == '__main__':
    sys.modules['strangers.room'] = sys.modules['__main__']
    sys.path.insert(0, str(ROOT / 'tests'))
    sys.exit(main())
