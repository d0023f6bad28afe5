"Two threads, no display, and an environment (thread counts, too) that no test leaves changed."

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
THREADS = str(min(2, os.cpu_count() or 1))
ENVIRONMENT = {
    'OMP_NUM_THREADS': THREADS,
    'MKL_NUM_THREADS': THREADS,
    'OPENBLAS_NUM_THREADS': THREADS,
    'NUMBA_NUM_THREADS': THREADS,
    'OMP_WAIT_POLICY': 'PASSIVE',  # before torch is imported: waiting threads sleep
    'MPLBACKEND': 'Agg',
    'GLOG_minloglevel': '2',
}
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
# numba writes compiled kernels beside the code where it may
if not os.access(ROOT / 'spatialavatar0', os.W_OK):
    kept = Path.home() / '.cache' / 'spatialavatar0' / 'numba'
    os.environ.setdefault('NUMBA_CACHE_DIR', str(kept))
# a job in the background ignores Ctrl-C, and so would its children
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, str(ROOT / 'tools'))


@pytest.fixture(autouse=True)
def same_environment():
    """nbdev's test_nb leaves IN_TEST=1 behind, with which nbdev_export silently does nothing; pages
    may change variables, too, and pages that compare speeds use one thread."""
    before, folder = dict(os.environ), os.getcwd()
    yield
    os.environ.clear()
    os.environ.update(before)
    os.chdir(folder)
    import numba
    import torch

    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    torch.set_num_threads(int(THREADS))
    torch.set_grad_enabled(True)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    "Times are measured with nothing beside it."
    if config.getoption('--page-times'):
        config.option.numprocesses = 0
        config.option.dist = 'no'


PAGE_TIMES = """write results/pages.json, the seconds every page took, and, if the whole suite ran,
results/suite.json; tools/statistics_of_pages.py sets them beside what the pages state"""


def pytest_addoption(parser):
    parser.addoption('--page-times', action='store_true', help=PAGE_TIMES)


@pytest.fixture(scope='session')
def page_times(request):
    "Seconds by page; those of pages that did not run stay."
    times = {}
    yield times
    if not request.config.getoption('--page-times') or not times:
        return
    path = ROOT / 'results' / 'pages.json'
    old = json.loads(path.read_text()) if path.exists() else {}
    here = {name: s for name, s in old.items() if (ROOT / 'nbs' / f'{name}.ipynb').exists()}
    path.write_text(json.dumps(dict(sorted((here | times).items())), indent=1) + '\n')


def pytest_sessionstart(session):
    session.started = time.time()


def is_whole(config):
    "Whether nothing was left out of a run."
    return config.args_source.name != 'ARGS' and not config.getoption('-k')


def pytest_sessionfinish(session, exitstatus):
    "Facts of a whole run that passed, for tools/covers.py."
    config = session.config
    reporter = config.pluginmanager.get_plugin('terminalreporter')
    wanted = config.getoption('--page-times') and is_whole(config)
    if exitstatus or not wanted or not reporter:
        return
    facts = dict(
        passed=len(reporter.stats.get('passed', [])),
        skipped=len(reporter.stats.get('skipped', [])),
        seconds=round(time.time() - session.started),
    )
    (ROOT / 'results' / 'suite.json').write_text(json.dumps(facts) + '\n')
