"Two threads, no display, and an environment (thread counts, too) that no test leaves changed."

import json
import os
import signal
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
threads = str(min(2, os.cpu_count() or 1))
for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'NUMBA_NUM_THREADS'):
    os.environ.setdefault(name, threads)
os.environ.setdefault(
    'OMP_WAIT_POLICY', 'PASSIVE'
)  # before torch is imported: waiting threads sleep instead of spinning
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('GLOG_minloglevel', '2')
if not os.access(
    ROOT / 'spatialavatar0', os.W_OK
):  # numba writes compiled kernels beside the code where it may
    os.environ.setdefault(
        'NUMBA_CACHE_DIR', str(Path.home() / '.cache' / 'spatialavatar0' / 'numba')
    )
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a job in the background ignores Ctrl-C, and so would its children


@pytest.fixture(autouse=True)
def same_environment():
    """nbdev's test_nb leaves IN_TEST=1 behind, with which nbdev_export silently does nothing; pages
    may change variables, too."""
    before, folder = dict(os.environ), os.getcwd()
    yield
    os.environ.clear()
    os.environ.update(before)
    os.chdir(folder)
    import numba
    import torch  # pages that compare speeds use one thread, and run in this process

    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    torch.set_num_threads(int(threads))
    torch.set_grad_enabled(True)


def pytest_addoption(parser):
    parser.addoption(
        '--page-times',
        action='store_true',
        help=(
            'write results/pages.json, the seconds every page took '
            '(tools/statistics_of_pages.py sets them beside what the page states), and, if the whole suite ran, results/suite.json'
        ),
    )


@pytest.fixture(scope='session')
def page_times(request):
    "Seconds by page."
    times = {}
    yield times
    if request.config.getoption('--page-times') and times:
        path = ROOT / 'results' / 'pages.json'
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(
            json.dumps(
                dict(
                    sorted(
                        {
                            **{
                                k: v
                                for k, v in old.items()
                                if (ROOT / 'nbs' / f'{k}.ipynb').exists()
                            },
                            **times,
                        }.items()
                    )
                ),
                indent=1,
            )
            + '\n'
        )


def pytest_sessionstart(session):
    session.started = time.time()


def pytest_sessionfinish(session, exitstatus):
    "Facts of a whole run that passed, for tools/covers.py."
    config = session.config
    done = config.pluginmanager.get_plugin('terminalreporter')
    if (
        exitstatus
        or not config.getoption('--page-times')
        or config.args_source.name == 'ARGS'
        or config.getoption('-k')
        or not done
    ):
        return
    facts = dict(
        passed=len(done.stats.get('passed', [])),
        skipped=len(done.stats.get('skipped', [])),
        seconds=round(time.time() - session.started),
    )
    (ROOT / 'results' / 'suite.json').write_text(json.dumps(facts) + '\n')
