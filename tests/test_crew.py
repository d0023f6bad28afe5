"Many people on Dask: what dies, who sees what, and that no line changes."

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from spatialavatar0.ground.core import InputError
from spatialavatar0.head.head import open_head
from spatialavatar0.inspection import inspect_path
from spatialavatar0.judge import benchmark
from spatialavatar0.judge.benchmark import NoMore, jobs_of, kit_content, run_all
from spatialavatar0.judge.results import Line, Results
from spatialavatar0.pictures.clips import write_vhap
from spatialavatar0.pictures.people import make_person, mono_clip
from spatialavatar0.pipeline import BenchmarkOptions

distributed = pytest.importorskip('distributed')
pytest.importorskip('cryptography')
pytestmark = pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')
psutil = pytest.importorskip('psutil')
MAIN = 'import sys; from spatialavatar0.cli import main; sys.exit(main())'
WORDS = '--protocol last:2 --method warp+paper --iters 4 --resolution 24'.split()


@pytest.fixture(scope='module')
def people(tmp_path_factory):
    "Eight of them, 48 pixels wide."
    folder = tmp_path_factory.mktemp('crew') / 'people'
    for number in range(8):
        clip = mono_clip(make_person(number, resolution=48), 8, 48, seed=number)
        write_vhap(clip, folder / f'p{number}', open_head(), show=False)
    return folder


def jobs(people, method='warp', **more):
    return jobs_of(people, 'last:2', method, resolution=24, **more)


def until(is_true, seconds=180):
    "Wait for something, and fail if it does not come."
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, 'it did not happen'
        time.sleep(0.05)


def lines_in(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


def same_lines(path):
    "Lines as they are, but for their order and for what they say of time."
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    for row in rows:
        for name in ('seconds', 'date', 'when', 'time'):
            row.pop(name, None)
    return sorted(rows, key=lambda row: (row['subject'], row['seed']))


def ended(process):
    "Nothing of a process and of those it started is left."
    group = [p for p in psutil.process_iter() if _group_of(p) == process.pid]
    return not [p for p in group if p.status() != psutil.STATUS_ZOMBIE]


def _group_of(process):
    try:
        return os.getpgid(process.pid)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return None


# ---- an engine of others


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


class Engine:
    "A scheduler and two workers, as a shell would start them."

    def __init__(self, folder):
        self.folder, self.port, self.started = folder, free_port(), []
        self.address = f'tcp://127.0.0.1:{self.port}'

    def start(self, *words):
        log = (self.folder / 'engine.log').open('a')
        own = dict(stdout=log, stderr=log, start_new_session=True, cwd=self.folder)
        command = [sys.executable, '-m', 'dask', *map(str, words), '--no-dashboard']
        self.started.append(subprocess.Popen(command, **own))
        return self.started[-1]

    def up(self):
        scheduler = self.start('scheduler', '--host', '127.0.0.1', '--port', self.port)
        quick = '--nthreads', 1, '--memory-limit', 0
        return scheduler, [self.start('worker', self.address, *quick) for _ in range(2)]

    def end(self):
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def engine(tmp_path):
    found = Engine(tmp_path)
    yield found
    found.end()


@pytest.fixture
def command(tmp_path):
    "Starts benchmarks, each in a group of its own, as a terminal does; ends them."
    started = []
    yield lambda *words: started.append(_started(*words)) or started[-1]
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _started(people, out, *words):
    said = subprocess.PIPE
    call = [sys.executable, '-c', MAIN, 'benchmark', people, *WORDS, '--out', out]
    own = dict(stdout=said, stderr=said, text=True, start_new_session=True)
    return subprocess.Popen([*map(str, call), *map(str, words)], **own)


def computing(nanny):
    "The process of a worker that a nanny watches over."
    children = psutil.Process(nanny.pid).children(recursive=True)
    return next(child for child in children if 'spawn_main' in ' '.join(child.cmdline()))


@pytest.mark.skipif(not os.environ.get('SLOW'), reason='two minutes; SLOW=1 runs it')
def test_deaths_change_no_line(people, tmp_path, engine, command):
    """Signal 9 for a worker, then for the scheduler, while eight people wait for two workers. (The
    first run is to compile: a process that compiles a kernel has other last digits than one that
    loads it from numba's cache.)"""
    for name in ('first', 'calm'):
        assert command(people, tmp_path / f'{name}.jsonl').wait(timeout=240) == 0
    out = tmp_path / 'out.jsonl'
    scheduler, workers = engine.up()
    first = command(people, out, '--cluster', engine.address)
    until(lambda: lines_in(out) >= 1)
    computing(workers[0]).kill()
    until(lambda: lines_in(out) >= 4)
    scheduler.kill()
    said = first.communicate(timeout=180)[1]
    assert first.returncode == 1
    assert said.count('\n') == 1
    assert f'the scheduler at {engine.address} is gone' in said
    assert 4 <= lines_in(out) < 8
    engine.up()
    again = command(people, out, '--cluster', engine.address)
    assert again.wait(timeout=240) == 0, again.communicate()[1]
    assert same_lines(out) == same_lines(tmp_path / 'calm.jsonl')


# ---- our own processes

CREW = """
import os, time
from spatialavatar0.ground.lease import as_ctrl_c, exit_code
from spatialavatar0.judge.benchmark import _crew
if __name__ == '__main__':
    with as_ctrl_c() as came:
        try:
            with _crew(2, None, {}) as client:
                client.wait_for_workers(2)
                busy = client.submit(time.sleep, 60)
                print(*client.run(os.getpid).values(), flush=True)
                busy.result()
        except KeyboardInterrupt:
            pass
    raise SystemExit(exit_code(came))
"""


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_its_parent(number, tmp_path):
    (tmp_path / 'crew.py').write_text(CREW)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    process = subprocess.Popen([sys.executable, tmp_path / 'crew.py'], **pipes)
    workers = [int(word) for word in process.stdout.readline().split()]
    assert len(workers) == 2
    assert all(map(psutil.pid_exists, workers))
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    until(lambda: ended(process), 20)
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert 'Traceback' not in said


STEPS = """
import os
from pathlib import Path
from spatialavatar0.stage2.loop import Refinement
real = getattr(Refinement, 'real', Refinement.step)  # Dask may read this file twice
def step(self):
    real(self)
    Path(__file__).with_name(f'{os.getpid()}.stepped').touch()
Refinement.real, Refinement.step = real, step
"""


def test_ctrl_c_keeps_refinements(people, tmp_path, monkeypatch, command):
    "As a terminal sends it: to the command and to all that it has started."
    out, states = tmp_path / 'out.jsonl', tmp_path / 'out_states'
    (tmp_path / 'steps.py').write_text(STEPS.replace('__file__', repr(str(tmp_path / 'x'))))
    monkeypatch.setenv('DASK_DISTRIBUTED__WORKER__PRELOAD', str([str(tmp_path / 'steps.py')]))
    process = command(people, out, '--jobs', 2, '--iters', 1_000_000)
    until(lambda: len(list(tmp_path.glob('*.stepped'))) >= 2)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=180)[1]
    assert process.returncode == 130, said
    assert said.strip().endswith('nothing was left half-written')
    assert 'Traceback' not in said
    until(lambda: ended(process), 20)
    steps = list(inspect_path(states).facts.values())
    assert len(steps) == 2
    assert all(0 < step for step in steps)


PRELOAD = """
import os, signal
import spatialavatar0.judge.benchmark as module
real = getattr(module, 'real', module.run_job)  # Dask may read this file twice
def run_job(job):
    if job.shown == 'p1':
        os.kill(os.getpid(), signal.SIGKILL)
    return real(job)
module.real, module.run_job = real, run_job
"""


def test_who_kills_its_workers_is_left_out(people, tmp_path):
    (tmp_path / 'preload.py').write_text(PRELOAD)
    said = []
    words = {
        'distributed.worker.preload': [str(tmp_path / 'preload.py')],
        'distributed.scheduler.allowed-failures': 1,
    }
    import dask

    with dask.config.set(words):
        lost = run_all(jobs(people)[:4], tmp_path / 'out.jsonl', 2, said.append)
    assert list(lost) == ['p1']
    assert [text for text in said if 'left out' in text] == [f'left out: p1: {lost["p1"]}']
    assert 'memory' in lost['p1']
    found = sorted(line.subject for line in Results(tmp_path / 'out.jsonl').lines)
    assert found == ['p0', 'p2', 'p3']


def test_each_worker_sees_one_gpu(monkeypatch):
    monkeypatch.setattr(benchmark, '_gpu_names', lambda: ['3', '5'])
    with benchmark._crew(2, None, dict(GPU=1)) as client:
        client.wait_for_workers(2)
        seen = client.run(lambda: os.environ['CUDA_VISIBLE_DEVICES'])
        offered = client.scheduler_info(n_workers=-1)['workers'].values()
        assert sorted(seen.values()) == ['3', '5']
        assert [worker['resources'] for worker in offered] == [dict(GPU=1)] * 2
        assert client.scheduler.address.startswith('tls://127.0.0.1')


@pytest.mark.parametrize(
    'visible, count, names', [('', 2, ['0', '1']), ('2,7', 2, ['2', '7']), ('4', 1, ['4'])]
)
def test_names_of_gpus(visible, count, names, monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    monkeypatch.setattr('torch.cuda.device_count', lambda: count)
    assert benchmark._gpu_names() == names


def test_how_many_processes(monkeypatch):
    monkeypatch.setattr('torch.cuda.device_count', lambda: 4)
    assert BenchmarkOptions().count() == 1
    assert BenchmarkOptions(device='cuda').count() == 4
    assert BenchmarkOptions(2, device='cuda').count() == 2
    assert BenchmarkOptions(device='cuda', cluster='tcp://there').for_jobs()['threads'] == 0


# ---- workers that are threads of this process: what goes where, and who sees what


@contextlib.contextmanager
def threads(*resources):
    "The address of a scheduler, with a worker for each of these resources."
    workers = {
        i: dict(
            cls=distributed.Worker, options=dict(nthreads=2, resources=offered, host='127.0.0.1')
        )
        for i, offered in enumerate(resources)
    }
    scheduler = dict(
        cls=distributed.Scheduler, options=dict(host='127.0.0.1', port=0, dashboard=False)
    )
    with distributed.SpecCluster(workers, scheduler) as cluster:
        yield cluster.scheduler_address


def test_a_gpu_has_one_job_at_a_time(people, tmp_path, monkeypatch):
    seen, awake, most = [], [], []

    def nap(job):
        awake.append(job)
        most.append(len(awake))
        time.sleep(0.05)
        awake.remove(job)
        seen.append(distributed.get_worker().name)
        return Line(**job.key, scores={})

    monkeypatch.setattr(benchmark, 'run_job', nap)
    monkeypatch.setattr(benchmark, '_turn', contextlib.nullcontext())  # the scheduler alone decides
    monkeypatch.setattr(benchmark, '_needs', lambda job: dict(GPU=1))
    with threads(dict(GPU=1), {}) as address:
        run_all(jobs(people), tmp_path / 'out.jsonl', cluster=address)
    assert (set(seen), max(most), len(seen)) == ({0}, 1, 8)
    assert len(Results(tmp_path / 'out.jsonl').lines) == 8


def test_needs_of_jobs(people):
    job = jobs(people)[0]
    assert benchmark._needs(job) == {}
    assert benchmark._needs(replace(job, device='cuda')) == dict(GPU=1)


def test_other_files_stop_it(people, tmp_path, monkeypatch):
    "A machine with another head under the same name."
    real = benchmark.job_content

    def seen_from(job, head=None):
        is_worker = threading.current_thread() is not threading.main_thread()
        return real(job, head) | (dict(head='another') if is_worker else {})

    monkeypatch.setattr(benchmark, 'job_content', seen_from)
    out = tmp_path / 'out.jsonl'
    with (
        threads({}) as address,
        pytest.raises(NoMore, match='machine .* other files of p0: the head model$'),
    ):
        run_all(jobs(people), out, cluster=address)
    assert not lines_in(out)


def test_files_that_are_only_here(people, monkeypatch):
    def nothing(job, head=None):
        raise InputError('no folder there')

    job = jobs(people)[0]
    letter = pickle.dumps((job, benchmark.job_content(job)))
    monkeypatch.setattr(benchmark, 'job_content', nothing)
    said = benchmark._serve(letter, kit_content(), 'me', '.')
    assert said == dict(refused='cannot read what can be read here: no folder there')


def test_another_kit_is_refused(monkeypatch):
    serve, _ = benchmark._carried()
    said = serve(b'never read', kit_content() | dict(version='0.0.1'), 'me', '.')
    assert said['refused'].startswith('has another spatialavatar0: version')
    monkeypatch.setitem(sys.modules, 'spatialavatar0.judge.benchmark', None)
    assert 'lacks a spatialavatar0' in serve(b'never read', {}, 'me', '.')['refused']


def test_the_errand_travels_whole():
    "By value: a worker needs no module of ours to read it."
    import cloudpickle

    sent = [cloudpickle.dumps(function) for function in benchmark._carried()]
    code = 'import sys, pickle\nsys.modules["spatialavatar0"] = None\n'
    code += f'serve, stop = map(pickle.loads, {sent!r})\n'
    code += 'print(serve(b"", {}, "me", ".")["refused"], stop("me"))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.startswith('lacks a spatialavatar0'), done.stderr
    assert done.stdout.strip().endswith('False')


class Odd(Exception):
    "An error that no pickle brings home."

    def __reduce__(self):
        raise TypeError('stay here')


def test_a_bug_comes_home_as_text(people, tmp_path, monkeypatch):
    def odd(job):
        raise Odd('very')

    monkeypatch.setattr(benchmark, 'run_job', odd)
    with threads({}) as address, pytest.raises(RuntimeError, match='(?s)p0 .*Odd: very'):
        run_all(jobs(people), tmp_path / 'out.jsonl', cluster=address)


def test_who_is_broken_here_is_not_sent(people, tmp_path, monkeypatch):
    real = benchmark.job_content

    def broken(job, head=None):
        if job.shown == 'p2':
            raise InputError('its clip is broken')
        return real(job, head)

    monkeypatch.setattr(benchmark, 'job_content', broken)
    monkeypatch.setattr(benchmark, 'run_job', lambda job: Line(**job.key, scores={}))
    with threads({}, {}) as address:
        lost = run_all(jobs(people), tmp_path / 'out.jsonl', cluster=address)
    assert lost == dict(p2='its clip is broken')
    assert len(Results(tmp_path / 'out.jsonl').lines) == 7


def test_no_worker_is_told_once(people, tmp_path, monkeypatch):
    said = []

    def say(text):
        said.append(text)
        if 'no worker' in text:
            raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, '_needs', lambda job: dict(GPU=1))
    with threads({}) as address, pytest.raises(KeyboardInterrupt):
        run_all(jobs(people), tmp_path / 'out.jsonl', say=say, cluster=address)
    assert f'dask worker {address} --nthreads 1 --memory-limit 0 --resources GPU=1' in said[-1]


def test_nobody_answers(people, tmp_path):
    address = f'tcp://127.0.0.1:{free_port()}'
    with pytest.raises(InputError, match=f'no scheduler answers at {address}'):
        run_all(jobs(people), tmp_path / 'out.jsonl', cluster=address)


def test_without_the_package(people, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'distributed', None)
    with pytest.raises(InputError, match=r'pip install "spatialavatar0\[cluster\]"'):
        run_all(jobs(people), tmp_path / 'out.jsonl', 2)
    assert not run_all(jobs(people)[:1], tmp_path / 'out.jsonl')
