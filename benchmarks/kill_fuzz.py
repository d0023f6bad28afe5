"""Kill commands at random moments, race equal ones, compare what is left with undisturbed runs.

    python benchmarks/kill_fuzz.py                60 kills and 20 races: results/kill_fuzz.json
    python benchmarks/kill_fuzz.py --short        three kills and a race of refine, in a minute
    python benchmarks/kill_fuzz.py --every track  kill one command at each of its writes

A run is killed up to three times, by SIGKILL, SIGTERM or SIGINT, then it may finish. Half of the
kills come after a random time, half before a random write (a file opened for writing, locked,
renamed or removed, a folder made or removed), so that short steps are hit as often as long ones.
Then each file must be there, no other one, and each byte must be that of an undisturbed run;
only times may differ, the fields in TIMES, and the place of the run itself in `.command.json`.
Every fifth run starts a fresh interpreter; the others are forked from one that has imported
everything, so that kills hit the work and not the imports.
"""

import os

os.environ['OMP_NUM_THREADS'] = '1'  # the last bits depend on the number of threads
os.environ['MKL_NUM_THREADS'] = '1'
os.environ['OPENBLAS_NUM_THREADS'] = '1'
os.environ['NUMBA_NUM_THREADS'] = '1'
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('GLOG_minloglevel', '2')

import argparse
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

TIMES = {'seconds'}  # names of fields that hold times, at any depth of any file
SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
REFUSED = 'is being written by process'
# in turn; what takes seconds comes twice as often as what takes a minute
ALL = 'refine train benchmark track refine train benchmark build workers'.split()
CHANGES = {'os.rename', 'os.remove', 'os.rmdir', 'os.mkdir', 'os.truncate', 'fcntl.flock'}


# ---- inputs


def painted(home: Path) -> dict:  # name -> path
    "A film, a clip and a folder of people; made by a fork, because threads and forks do not mix."
    pid = os.fork()
    if not pid:
        try:
            paint(home)
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit('the inputs could not be painted')
    one, several = home / 'people', home / 'several'
    return dict(film=home / 'film.mp4', clip=one / 'ada', people=one, several=several)


def paint(home: Path):
    "The inputs, all of them small."
    from spatialavatar0.ground.core import to_uint8
    from spatialavatar0.pictures.clips import write_vhap
    from spatialavatar0.pictures.domains import multi, people
    from spatialavatar0.pictures.people import make_person, mono_clip
    from spatialavatar0.use.animate import write_film

    acted = mono_clip(make_person(3), 40, 224, seed=1, yaw=20.0, background=0.7)[:14]
    write_film([to_uint8(frame.image) for frame in acted], home / 'film.mp4', 25)
    for number, clip in enumerate(people(multi(64, instants=6, cameras=6), 1)):
        write_vhap(clip, home / 'several' / str(number))
    for seed, name in enumerate(('ada', 'bert')):
        clip = mono_clip(make_person(seed), 8, 64, seed=seed)
        write_vhap(clip, home / 'people' / name)


def commands(at: dict) -> dict:  # name -> words
    "What is killed and raced."
    small = '--iters', 40, '--resolution', 32
    judged = 'benchmark', at['people'], '--protocol', 'last:2', '--method', 'warp+paper', *small
    learnt = '--mono', at['people'], '--multi', at['several']
    found = dict(
        build=('build', at['film'], '--preset', 'tiny'),
        track=('track', at['film'], '--out', 'clip', '--size', 96),
        refine=('refine', 'new', at['clip'], *small),
        train=('train', '--preset', 'tiny', '--steps', 30, *learnt),
        benchmark=(*judged, '--out', 'results.jsonl'),
        workers=(*judged, '--out', 'results.jsonl', '--jobs', 2),
    )
    return {name: [str(word) for word in words] for name, words in found.items()}


# ---- processes


def watch_writes(inside: str, tell, stop: int = None, number: int = None):
    "Count the writes of this process below a folder; a signal before one of them."
    count = 0

    def is_inside(path):
        return isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(inside)

    def hook(event, words):
        nonlocal count
        if event == 'open':
            path, _, flags = words
            counts = flags & (os.O_WRONLY | os.O_RDWR) and is_inside(path)
        else:
            counts = event in CHANGES and (event == 'fcntl.flock' or is_inside(words[0]))
        if not counts:
            return
        os.write(tell, b'.')
        count += 1
        if count == stop:
            os.kill(os.getpid(), number)

    sys.addaudithook(hook)


@dataclass
class Run:
    "A command on its way."

    process: subprocess.Popen  # or None: forked
    pid: int
    log: Path
    code: int = None  # once it has ended

    def wait(self, seconds=None):  # its exit code; None: not yet
        until = time.monotonic() + (seconds if seconds is not None else 600)
        while self.code is None and time.monotonic() < until:
            self.code = self.process.poll() if self.process else self._forked_code()
            time.sleep(0.002)
        if self.code is None and seconds is None:
            os.kill(self.pid, signal.SIGKILL)
            raise TimeoutError(f'{self.log}: not finished after ten minutes')
        return self.code

    def _forked_code(self):
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None


def start(words: list, folder: Path, stop=None, number=None, fresh=False) -> Run:
    "A command in a folder, in a session of its own; what it says goes beside the folder."
    folder.mkdir(exist_ok=True)
    log = folder.with_suffix('.log')
    if fresh:
        code = 'import sys; from spatialavatar0.cli import main; sys.exit(main())'
        with log.open('w') as said:
            how = dict(cwd=folder, stdout=said, stderr=said, start_new_session=True)
            process = subprocess.Popen([sys.executable, '-c', code, *words], **how)
        return Run(process, process.pid, log)
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return Run(None, pid, log)
    try:
        _be_command(words, folder, log, stop, number)
    finally:
        os._exit(99)


def _be_command(words, folder, log, stop, number):
    "What a forked process does."
    os.setsid()
    os.chdir(folder)
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.argv = ['spatialavatar0', *words]
    tell = os.open(folder.with_suffix('.writes'), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    watch_writes(str(folder), tell, stop, number)
    from spatialavatar0.cli import main

    code = 1
    try:
        code = main(words)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def orphans(session: int, seconds: float = 20) -> int:
    "How many processes of a session are left when there was time to end."
    until = time.monotonic() + seconds
    while (left := _members(session)) and time.monotonic() < until:
        time.sleep(0.05)
    return len(left)


def _members(session):
    left = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(')')[2].split()
            if fields[3] == str(session) and fields[0] not in 'ZX':
                left.append(int(stat.parent.name))
    return left


# ---- what is left


def without_times(value):
    "JSON without the fields that hold times."
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    if isinstance(value, list):
        return [without_times(v) for v in value]
    if isinstance(value, str) and value[:1] in '{[':
        with contextlib.suppress(ValueError):
            return without_times(json.loads(value))
    return value


def content(path: Path, home: str):
    "A file's bytes, or what stands for them once times and its own place are gone."
    data = path.read_bytes().replace(home.encode(), b'HOME')
    if path.suffix == '.json':
        return without_times(json.loads(data))
    if path.suffix == '.jsonl':
        rows = [without_times(json.loads(row)) for row in data.splitlines()]
        return sorted(json.dumps(row, sort_keys=True) for row in rows)
    if path.suffix == '.safetensors':
        end = 8 + int.from_bytes(data[:8], 'little')
        return without_times(json.loads(data[8:end])), data[end:]
    return data


def tree(folder: Path) -> dict:  # path -> content; folders have none
    "All that is in a folder, hidden files included."
    paths = sorted(folder.rglob('*'))
    home = str(folder)
    return {str(p.relative_to(folder)): content(p, home) if p.is_file() else None for p in paths}


def differences(folder: Path, expected: dict) -> list:  # in words
    "How a folder differs from an undisturbed one."
    found = tree(folder)
    lost = [f'lost {name}' for name in expected if name not in found]
    litter = [f'litter {name}' for name in found if name not in expected]
    both = [name for name in expected if name in found]
    return lost + litter + [f'other bytes {n}' for n in both if found[n] != expected[n]]


# ---- kills and races


@dataclass
class Reference:
    "An undisturbed run."

    words: list
    tree: dict
    seconds: float
    writes: int


def undisturbed(words: list, folder: Path) -> Reference:
    "A first run compiles and warms up; the second one is what others are held to."
    for attempt in ('warm', 'whole'):
        there = folder.with_name(f'{folder.name}_{attempt}')
        began = time.monotonic()
        run = start(words, there)
        if code := run.wait():
            raise SystemExit(f'{" ".join(words)} ended with {code}: {run.log.read_text()[-2000:]}')
        seconds = time.monotonic() - began
    writes = there.with_suffix('.writes').stat().st_size
    return Reference(words, tree(there), seconds, writes)


def kill_once(reference: Reference, folder: Path, rng, fresh, when=None) -> dict:
    "Start a command and kill it; -> what was seen, None where it finished first."
    number = rng.choice(SIGNALS)
    by_time = fresh or rng.random() < 0.5
    if when is not None:
        number, by_time = when[0], False
    stop = when[1] if when else rng.randint(1, reference.writes)
    hook = {} if by_time else dict(stop=stop, number=number)
    run = start(reference.words, folder, fresh=fresh, **hook)
    began = time.monotonic()
    if by_time:
        imports = 4 if fresh else 0
        if run.wait(imports + 0.8 * rng.random() * reference.seconds) is None:
            os.kill(run.pid, number)
            began = time.monotonic()
    code = run.wait()
    if code == 0:  # faster than the undisturbed run was: the machine has less to do now
        reference.seconds = min(reference.seconds, time.monotonic() - began)
        return None
    seen = dict(signal=number.name, how='time' if by_time else f'write {stop}', code=code)
    said = run.log.read_text()
    is_early = code == 99 and not said  # the signal came before the command began
    wrong = 'Traceback' in said or (code != CODES[number] and not is_early)
    seen |= dict(seconds=time.monotonic() - began if by_time else 0, orphans=orphans(run.pid))
    return seen | (dict(wrong=f'{code}: {said[-1500:]}') if wrong else {})


def kill_case(reference: Reference, folder: Path, rng, fresh=False, when=None) -> dict:
    "Kill a command up to three times, then let it finish."
    kills = []
    for _ in range(1 if when else rng.randint(1, 3)):
        seen = kill_once(reference, folder, rng, fresh, when)
        if seen is None:
            break
        kills.append(seen)
    run = start(reference.words, folder, fresh=fresh)
    code = run.wait()
    bad = differences(folder, reference.tree)
    bad += [f'the last run ended with {code}: {run.log.read_text()[-1500:]}'] if code else []
    bad += [f'{seen["orphans"]} orphans' for seen in kills if seen['orphans']]
    bad += [seen['wrong'] for seen in kills if 'wrong' in seen]
    return dict(kills=kills, bad=bad)


def race_case(reference: Reference, folder: Path, rng, other: Reference = None) -> dict:
    "Start two commands in one folder, the second a moment later."
    first = start(reference.words, folder)
    time.sleep(rng.random() ** 2 * reference.seconds / 2)
    folder_log = folder.with_name(f'{folder.name}b')
    second = _beside(other or reference, folder, folder_log)
    codes = first.wait(), second.wait()
    refused = [_refusal(run, code) for run, code in zip((first, second), codes)]
    bad = [words for words in refused if words and REFUSED not in words]
    bad += ['both were refused'] if all(codes) else []
    bad += differences(folder, (other or reference).tree)
    return dict(refused=sum(map(bool, refused)), bad=bad)


def _beside(reference, folder, log):
    "The second command works in the folder of the first and has a log of its own."
    link = log
    link.symlink_to(folder, target_is_directory=True)
    return start(reference.words, link)


def _refusal(run, code):
    "What a refused command says; more than a line is a fault."
    if not code:
        return ''
    said = run.log.read_text()
    errors = [line for line in said.splitlines() if line.startswith('error: ')]
    is_line = code == 1 and len(errors) == 1 and 'Traceback' not in said
    return errors[0] if is_line else f'{code}: {said[-1500:]}'


# ---- all of it


def say_case(name, number, result, lost):
    for words in result['bad']:
        print(f'  {name} {number}: {words}', flush=True)
    lost.extend(f'{name} {number}: {words}' for words in result['bad'])


def fuzz(home: Path, names: list, kills: int, races: int, seed: int) -> dict:
    "Random kills in turn over the commands, then races."
    rng = random.Random(seed)
    known = commands(painted(home))
    references = {n: undisturbed(known[n], home / n) for n in dict.fromkeys(names)}
    for name, reference in references.items():
        print(f'{name:10} {reference.seconds:6.1f} s, {reference.writes} writes', flush=True)
    bad, seen = [], {name: [] for name in names}
    case = 0
    while sum(map(len, seen.values())) < kills:
        name = names[case % len(names)]
        result = kill_case(references[name], home / f'kill{case}', rng, fresh=case % 5 == 4)
        seen[name] += result['kills']
        say_case(name, f'kill {case}', result, bad)
        print(f'kill {case:3} {name}: {[k["signal"] + " " + k["how"] for k in result["kills"]]}')
        case += 1
    refused = Counter()
    for number in range(races):
        name = names[number % len(names)]
        result = race_case(references[name], home / f'race{number}', rng)
        refused[name] += result['refused']
        say_case(name, f'race {number}', result, bad)
        print(f'race {number:3} {name}: {result["refused"]} refused')
    return dict(kills=seen, races=races, refused=dict(refused), bad=bad)


def table(found: dict) -> str:
    "Kills by command and signal, and how long an end took."
    lines = ['command     SIGKILL  SIGTERM  SIGINT  longest end, s']
    for name, kills in found['kills'].items():
        counts = Counter(kill['signal'] for kill in kills)
        asked = [kill['seconds'] for kill in kills if kill['signal'] != 'SIGKILL']
        numbers = '  '.join(f'{counts[number.name]:7}' for number in SIGNALS)
        lines.append(f'{name:10} {numbers}  {max(asked, default=0):10.2f}')
    total = sum(map(len, found['kills'].values()))
    end = f'{total} kills, {found["races"]} races ({sum(found["refused"].values())} refused)'
    return '\n'.join([*lines, f'{end}: {len(found["bad"])} faults'])


def every_write(home: Path, name: str) -> dict:
    "Kill a command before each of its writes, the signals in turn."
    reference = undisturbed(commands(painted(home))[name], home / name)
    print(f'{name}: {reference.writes} writes', flush=True)
    bad, kills = [], []
    for stop in range(1, reference.writes + 1):
        when = SIGNALS[stop % 3], stop
        result = kill_case(reference, home / f'kill{stop}', random.Random(stop), when=when)
        kills += result['kills']
        say_case(name, f'write {stop}', result, bad)
    return dict(kills={name: kills}, races=0, refused={}, bad=bad)


def import_everything():
    "What commands import, so that a fork has it."
    import matplotlib.figure  # noqa: F401

    import spatialavatar0.pipeline  # noqa: F401


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--short', action='store_true', help='three kills and a race, in a minute')
    parser.add_argument('--every', help='kill this command at each of its writes')
    parser.add_argument('--kills', type=int, default=60)
    parser.add_argument('--races', type=int, default=20)
    parser.add_argument('--only', nargs='*', help='commands')
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args()
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    import_everything()
    home = Path(tempfile.mkdtemp(prefix='kill_fuzz_'))
    names = options.only or ALL
    if options.short:
        names, options.kills, options.races = ['refine'], 3, 1
    if options.every:
        found = every_write(home, options.every)
    else:
        found = fuzz(home, names, options.kills, options.races, options.seed)
    print(table(found))
    if not (options.short or options.every or options.only):
        write_result(found)
    return bool(found['bad'])


def write_result(found):
    "results/kill_fuzz.json."
    from common import machine

    path = Path(__file__).parents[1] / 'results' / 'kill_fuzz.json'
    about = dict(machine=machine(), times=sorted(TIMES), table=table(found).splitlines())
    path.write_text(json.dumps(about | found, indent=1) + '\n')


if __name__ == '__main__':
    sys.exit(main())
