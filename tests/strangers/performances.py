"""Recorded performances: ARKit's weights as tables and JSON."""

import json
import math

from spatialavatar0.use.performances import read_arkit

from .make import ESCAPES, INSTEAD, JSON, file, instead, written
from .room import HARMLESS, SOUND, WARNED, Case

HEAD = 'Timecode,BlendshapeCount,EyeBlinkLeft,JawOpen'


def table(*rows, head=HEAD, count=65):
    "A maker of a .csv: sound rows, then these."
    good = [f'00:00:{i // 30:02}:{i % 30:02}.000,61,0.1,0.{i}' for i in range(count)]
    return file('x.csv', lambda: '\n'.join([head, *good, *rows]) + '\n')


def weights(**change):
    "A maker of a .json of names and rows."
    good = dict(facsNames=['eyeBlinkLeft', 'jawOpen'], weightMat=[[0.1, 0.2]] * 4, exportFps=30)
    return file('x.json', json.dumps(good | change))


CSV = {
    'NUL': ('text', file('x.csv', HEAD.encode() + b'\n\0\0\0\n')),
    'UTF-16 of nothing': ('text', file('x.csv', 'hello'.encode('utf-16'))),
    'no encoding': ('text', file('x.csv', b'\xff\xc0\xfe\x81' * 50)),
    'a header alone': ('cut', table(count=0)),
    'a header of escapes': ('text', file('x.csv', ESCAPES.replace('\n', ' ') + ',a\n1,2\n')),
    'a row of two': ('cut', table('0,1')),
    'a row of a hundred': ('kind', table(','.join('0' * 100))),
    'a weight of letters': ('kind', table('00:00:00:05.000,61,a,b')),
    'a weight of escapes': ('text', table('00:00:00:05.000,61,\x1b[2J,\x07')),
    'a weight of infinity': ('number', table('00:00:00:05.000,61,inf,0')),
    'a quote that never ends': ('cut', table('"' + 'x' * 200_000)),
    'one field of a million letters': ('bomb', table('x' * 10**6)),
    'a column twice': ('kind', file('x.csv', 'jawOpen,JawOpen\n0,1\n' * 2)),
    '100,000 columns of nothing': (
        'bomb',
        file('x.csv', lambda: ','.join(f'c{i}' for i in range(10**5)) + '\n'),
    ),
}
LOUD_CSV = {  # what is used, with a word
    'a weight of 1e308': ('number', table('00:00:00:05.000,61,1e308,0')),
    'a weight of -1e308': ('number', table('00:00:00:05.000,61,-1e308,0')),
}
WEIGHTS = {
    'a rate of 10^6': ('number', weights(exportFps=10**6)),
    'a rate of 0': ('number', weights(exportFps=0)),
    'a rate of -1': ('number', weights(exportFps=-1)),
    'a rate of NaN': ('number', weights(exportFps=math.nan)),
    'a rate of 10^400': ('number', weights(exportFps=10**400)),
    'a rate of true': ('kind', weights(exportFps=True)),
    'a rate of escapes': ('text', weights(exportFps=ESCAPES)),
    'rows of text': ('kind', weights(weightMat=['ab'] * 4)),
    'rows of null': ('kind', weights(weightMat=[None] * 4)),
    'rows of text numbers with escapes': ('text', weights(weightMat=[['\x1b[2J', '1']] * 4)),
    'no rows': ('cut', weights(weightMat=[])),
    'rows that are text': ('kind', weights(weightMat='all')),
    'a weight of 10^400': ('number', weights(weightMat=[[10**400, 0]] * 4)),
    'a weight of infinity': ('number', weights(weightMat=[[math.inf, 0]] * 4)),
    'names that are numbers': ('kind', weights(facsNames=[1, 2])),
    'names of escapes': ('text', weights(facsNames=[ESCAPES, ESCAPES + '2'])),
    'names that are lists': ('kind', weights(facsNames=[[1], [2]])),
    'frames nested 500 deep': ('bomb', file('x.json', '{"frames": ' + '[' * 500 + ']' * 500 + '}')),
    'dicts nested 500 deep': (
        'bomb',
        file('x.json', '{"frames": [' + '{"a": ' * 500 + '1' + '}' * 500 + ']}'),
    ),
    'a million empty lists': ('bomb', file('x.json', lambda: '[' + '[],' * 10**6 + '[]]')),
}


def long_time(folder):
    "Two frames 10^12 seconds apart: at 60 a second no machine holds them."
    rows = [dict(time=0, jawOpen=0.1), dict(time=0.02, jawOpen=0.2), dict(time=10**12, jawOpen=0.3)]
    return written(folder / 'x.json', json.dumps(dict(fps=60, frames=rows)))


CASES = [
    Case('ARKit csv', SOUND, 'a sound one', table(), read_arkit, HARMLESS),
    Case('ARKit json', SOUND, 'a sound one', weights(), read_arkit, HARMLESS),
    Case(
        'ARKit json',
        'kind',
        'rows of lists',
        weights(weightMat=[[[1], [2]]] * 4),
        read_arkit,
        WARNED,
    ),
    *(Case('ARKit csv', t, w, make, read_arkit) for w, (t, make) in CSV.items()),
    *(Case('ARKit csv', t, w, make, read_arkit, WARNED) for w, (t, make) in LOUD_CSV.items()),
    *(Case('ARKit json', t, w, make, read_arkit) for w, (t, make) in WEIGHTS.items()),
    *(Case('ARKit json', t, w, file('x.json', text), read_arkit) for w, (t, text) in JSON.items()),
    Case('ARKit json', 'bomb', 'frames 10^12 seconds apart', long_time, read_arkit),
    *(
        Case(f'ARKit {kind}', t, f'is {w}', instead(make, f'x.{kind}'), read_arkit)
        for kind in ('csv', 'json')
        for w, (t, make) in INSTEAD.items()
    ),
]
