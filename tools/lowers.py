"""Do the lower ends of settings.ini's ranges work? Try them, and write down what came.

    python tools/lowers.py           some 6 GB and ten minutes; writes results/lowers.json
    python tools/lowers.py FOLDER    the same, and the environment stays there

A range such as torch>=2.6 is a promise about 2.6. In a fresh environment every package that
settings.ini asks for (but for the extras lab and dev) gets its lowest version, everything else what
pip then takes; the package itself is installed as a user would; `pip check` and a short set of
tests run. tests/test_versions.py sees to it that the ranges of today are those that were tried.
"""

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from lock import ROOT, USER, pins, ranges

RESULT = ROOT / 'results' / 'lowers.json'
EXTRAS = [extra for extra in USER if extra != 'lab']
TESTS = """
    tests/test_head.py tests/test_gltf.py tests/test_formats.py tests/test_metrics_more.py
    tests/test_animate_export.py tests/test_viewer.py
    tests/test_generator.py::test_a_vision_transformer_behind_the_same_interface
    tests/test_schedule.py::test_two_processes_have_the_gradients_of_one
    tests/test_crew.py::test_other_files_stop_it tests/test_crew.py::test_each_worker_sees_one_gpu
    tests/test_cli.py::test_every_file_is_there_and_readable tests/test_cli.py::test_view
    tests/test_cli.py::test_animate tests/test_cli.py::test_drive_with_a_film
    tests/test_cli.py::test_export --deselect tests/test_viewer.py::test_panel_in_jupyterlab
""".split()


def lowest(requirement):
    "The lower end of a range, as a pin; None where it has none."
    ends = [s.version for s in requirement.specifier if s.operator in ('>=', '==')]
    return f'{requirement.name}=={ends[0]}' if ends else None


def promised():
    "The ranges as text, by name."
    found = ranges(*EXTRAS)
    return {name: sorted({str(r.specifier) for r in found[name]}) for name in sorted(found)}


def install(python, folder):
    "Lower ends of everything, and the package."
    ends = {lowest(r) for rs in ranges(*EXTRAS).values() for r in rs}
    if None in ends:
        raise SystemExit('settings.ini has a requirement without a lower end')
    (folder / 'lowest.txt').write_text('\n'.join(sorted(ends)) + '\n')
    where = f'{ROOT}[{",".join(EXTRAS)}]'
    env = {name: value for name, value in os.environ.items() if name != 'PIP_CONSTRAINT'}
    command = [python, '-m', 'pip', 'install', '-q', '-c', folder / 'lowest.txt', '-e', where]
    subprocess.run([*command, 'pytest', 'hypothesis', 'trimesh', 'playwright'], check=True, env=env)
    subprocess.run([python, '-m', 'pip', 'check'], check=True, env=env)


def versions(python):
    "What is installed."
    command = [python, '-m', 'pip', 'list', '--format', 'freeze', '--disable-pip-version-check']
    return pins(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run_tests(python):
    "Whether they pass, and pytest's last line."
    plain = ['-o', 'addopts=', '-q', '-rfE', '--tb=line', '-p', 'no:cacheprovider']
    command = [python, '-m', 'pytest', *plain, *TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-20_000:])
    last = done.stdout.strip().splitlines()[-1]
    return done.returncode == 0, re.sub(r'^=+ | in [\d.]+s.*$', '', last)


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, '-m', 'venv', '--clear', folder / 'venv'], check=True)
    python = folder / 'venv' / 'bin' / 'python'
    install(python, folder)
    passed, summary = run_tests(python)
    found = versions(python)
    result = dict(
        date=datetime.date.today().isoformat(),
        python=platform.python_version(),
        system=f'{platform.system()} {platform.machine()}',
        ranges=promised(),
        versions={name: found[name] for name in promised()},
        passed=passed,
        tests=summary,
    )
    RESULT.write_text(json.dumps(result, indent=1) + '\n')
    print(summary)
    return not passed


if __name__ == '__main__':
    if len(sys.argv) > 1:
        sys.exit(main(Path(sys.argv[1]).resolve()))
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(main(Path(folder)))
