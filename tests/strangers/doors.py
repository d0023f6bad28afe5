"""The command line: what is typed, where it leads, what is printed."""

import os
import sys

from spatialavatar0 import cli
from spatialavatar0.avatar.avatar import new_avatar
from spatialavatar0.head.head import open_head

from . import arrays, folders, performances, splats
from .make import ESCAPES, INSTEAD, file, instead, png, samples, written
from .ours import bent, put
from .room import HARMLESS, Case, Says, unprintable


def run(*words):
    "A command as typed: raises what it said and exit code 1; returns what it printed."
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    starts = [os.lseek(number, 0, os.SEEK_END) for number in (1, 2)]
    code = cli.main([str(word) for word in words])
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    out, err = (printed(number, start) for number, start in zip((1, 2), starts))
    for text in (out, err):
        if bad := set(unprintable(text)) - {'\n'}:
            raise RuntimeError(f'printed {min(bad)!r} in {text!r}')
    if code == 0:
        return out
    lines = [line for line in err.splitlines() if not line.startswith('note: ')]
    is_usage = code == 2 and err.startswith('usage: ')
    if not is_usage and code != 1 or len(lines) != 1:
        raise RuntimeError(f'exit code {code}, {len(lines)} lines: {err!r}')
    raise Says(lines[0])


def printed(number, start):
    "What went to a file descriptor since a place."
    size = os.lseek(number, 0, os.SEEK_CUR) - start
    return os.pread(number, size, start).decode(errors='surrogateescape')


def command(*words):
    "A door: the command, with what was made in the place of None."
    return lambda given: run(*(given if word is None else word for word in words))


VIEW = command('view', None, '--out', '../out/a.html')
INSPECT = command('inspect', None)
BUILD = command('build', None, '--out', '../out', '--preset', 'tiny')
TRACK = command('track', None, '--out', '../out/clip')
REFINE = command('refine', 'new', None, '--out', '../out', '--iters', '1')
EVALUATE = command('evaluate', 'warp', None, '--out', '../out/r.jsonl')
BENCHMARK = command('benchmark', None, '--out', '../out/r.jsonl')
ANIMATE = command('animate', samples() / 'avatar.safetensors', None, '--out', '../out/f.mp4')
EXPORT = command('export', samples() / 'avatar.safetensors', None)
HEADED = command('view', samples() / 'avatar.safetensors', '--head', None, '--out', '../out/a.html')
COMMANDS = {  # name -> door, the name of what it is given
    'view': (VIEW, 'a.safetensors'),
    'build': (BUILD, 'a.png'),
    'build of a film': (BUILD, 'a.mp4'),
    'track': (TRACK, 'a.mp4'),
    'refine': (REFINE, 'clip'),
    'evaluate': (EVALUATE, 'clip'),
    'animate': (ANIMATE, 'a.csv'),
    'view --head': (HEADED, 'a.pkl'),
}
NAMES = {
    'a line break in its name': 'a\nerror: all is well',
    'escapes in its name': ESCAPES.replace('\n', ''),
    'no encoding in its name': b'\xff\xfe\xc0',
    'a name of 255 letters': 'x' * 200,
    'a name like an option': '--help',
}


def odd_name(name, suffix):
    "A maker of noise under an odd name."

    def make(folder):
        raw = name if isinstance(name, bytes) else name.encode()
        path = os.path.join(os.fsencode(folder), raw + suffix.encode())
        with open(path, 'wb') as opened:
            opened.write(b'noise' * 99)
        return os.fsdecode(path)

    return make


def shut(name):
    "A maker of a file that may not be read."

    def make(folder):
        path = written(folder / name, b'x')
        path.chmod(0)
        folder.parent.chmod(0o777)
        (folder.parent / 'out').chmod(0o777)
        return path

    return make


def as_nobody(door):
    "The door, opened by a user without rights."

    def opened(given):
        os.setgid(65534)
        os.setuid(65534)
        return door(given)

    return opened


def too_long(folder):
    return folder / ('x' * 5000)


def missing(folder):
    return folder / ESCAPES.replace('/', '')


def command_cases():
    found = []
    for name, (door, file_name) in COMMANDS.items():
        for what, (threat, make) in INSTEAD.items():
            if not (name == 'track' and what == 'a folder'):
                found.append(
                    Case(f'$ {name}', threat, f'is {what}', instead(make, file_name), door)
                )
        suffix = os.path.splitext(file_name)[1]
        for what, odd in NAMES.items():
            found.append(Case(f'$ {name}', 'text', what, odd_name(odd, suffix), door))
        found.append(Case(f'$ {name}', 'path', 'a name of 5,000 letters', too_long, door))
        found.append(Case(f'$ {name}', 'text', 'there is none, named with escapes', missing, door))
    return found


def tells(printed):
    "inspect names a fault in its table, and ends well."
    return '' if 'note ' in printed or 'head needed' in printed else 'the fault is not told'


def inspect_cases():
    "Whatever it is: inspect says so, or what is wrong with it."
    makers = [
        *(('path', w, instead(m, 'thing')) for w, (_, m) in INSTEAD.items()),
        *(('text', w, odd_name(n, '.safetensors')) for w, n in NAMES.items()),
        ('code', 'a pickle', arrays.dumped(2)),
        ('bomb', 'a PNG of 10^5 x 10^5', file('x.png', png(10**5, 10**5))),
        ('bomb', 'an .npz of 10 GB', arrays.NPZ['unfolds to 10 GB'][1]),
        ('number', 'an avatar of resolution -7', bent('avatar', meta=put('resolution', -7))),
        ('number', 'a PLY of 10^12 rows', file('x.ply', splats.PLYS['a header of 10^12 rows'][1])),
        ('text', 'performances named with escapes', performances.CSV['a header of escapes'][1]),
    ]
    another = dict(head='0' * 16, head_name=ESCAPES)
    told = [
        ('text', 'an avatar of another head', bent('avatar', meta=lambda m: m | another)),
        ('path', 'a picture that leads out', folders.out_link('vhap', 'images/00001_00.png')),
        ('path', 'a picture that is /dev/zero', folders.frame('vhap', file_path='/dev/zero')),
        ('text', 'a clip of another head', folders.top('vhap', **another)),
        ('kind', 'frames that are numbers', folders.top('vhap', frames=[1, 2])),
    ]
    found = [Case('$ inspect', t, w, make, INSPECT) for t, w, make in makers]
    return found + [Case('$ inspect', t, w, make, INSPECT, HARMLESS, tells) for t, w, make in told]


def people(folder):
    "A folder of people whose names a terminal would obey, and whose clips are noise."
    for name in (ESCAPES.replace('/', ''), 'b'):
        written(folder / name / 'transforms.json', '{"frames": [{"flame_param_path": 3}]}')
        written(folder / name / 'canonical_flame_param.npz', b'')
    return folder


def out_is(make):
    "A maker of an --out where something stands already."

    def made(folder):
        place = folder.parent / 'out' / 'taken'
        make(place)
        return place

    return made


MORE = [
    Case('$ benchmark', 'text', 'people named with escapes', people, BENCHMARK),
    Case('$ benchmark', 'kind', 'is an empty folder', lambda folder: folder, BENCHMARK),
    *(
        Case('$ export', t, f'--out is {w}', out_is(make), EXPORT)
        for w, (t, make) in INSTEAD.items()
        if w in ('a pipe nobody writes to', 'a link to itself', 'a link to /dev/zero', 'a socket')
    ),
    *(
        Case(
            '$ view --out',
            t,
            f'is {w}',
            lambda folder, make=make: instead(make, 'a.html')(folder.parent / 'out'),
            command('view', samples() / 'avatar.safetensors', '--out', None),
        )
        for w, (t, make) in INSTEAD.items()
        if w == 'a folder'
    ),
    *(
        Case(f'$ {name}', 'path', 'may not be read', shut(file_name), as_nobody(door))
        for name, (door, file_name) in COMMANDS.items()
        if name in ('view', 'build', 'track', 'animate', 'view --head')
    ),
]


def prepare():
    new_avatar(open_head(), 16).save(samples() / 'avatar.safetensors')


CASES = command_cases() + inspect_cases() + MORE
