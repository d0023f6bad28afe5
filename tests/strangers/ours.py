"""Files this program writes itself, which a stranger may have bent: avatars, generators, states,
looks, results, journals, reports, protocols, manifests."""

import functools
import json
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import test_formats
import torch
from safetensors import safe_open

from spatialavatar0 import pipeline
from spatialavatar0.avatar.avatar import load_avatar, new_avatar
from spatialavatar0.ground.assets import load_manifest
from spatialavatar0.head.head import open_head
from spatialavatar0.judge.evaluate import load_protocols
from spatialavatar0.judge.results import Results, result_table
from spatialavatar0.pictures.clips import Clip, write_vhap
from spatialavatar0.pictures.domains import mono, multi, people
from spatialavatar0.stage1.generator import from_preset, from_pretrained
from spatialavatar0.stage1.schedule import laptop_schedule
from spatialavatar0.stage1.trainer import Shelf, Trainer
from spatialavatar0.stage2.loop import Refinement
from spatialavatar0.stage2.refine import RefineConfig
from spatialavatar0.use.animate import pose_of
from spatialavatar0.use.export import write_sequence
from spatialavatar0.use.viewer import write_page

from .make import (
    DEEP,
    ESCAPES,
    INSTEAD,
    JSON,
    MARKUP,
    file,
    instead,
    safetensors,
    samples,
    written,
)
from .room import HARMLESS, SOUND, Case

# ---- sound ones


@functools.cache
def sound(kind):
    "Tensors and header of a sound file: avatar, generator, refinement or training."
    with safe_open(samples() / f'{kind}.safetensors', 'np') as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()


def clip(name):
    "Painted people, as they were kept: one or many cameras."
    return Clip(torch.load(samples() / f'{name}.frames', weights_only=False))


def painted_refinement():
    start = new_avatar(open_head(), 16)
    return Refinement(start, clip('one'), RefineConfig(freeze=4, aspect_from=4), 8, seed=1)


def generator():
    return from_preset('tiny', open_head(), 0)


def painted_training():
    shelves = [Shelf([clip(name)], generator(), samples() / name) for name in ('one', 'many')]
    return Trainer(generator(), laptop_schedule(2, 2, 2), shelves, 3)


@functools.cache
def kept(name):
    "A run as it was kept: to make one takes threads, and no process with threads may fork."
    return pickle.loads((samples() / name).read_bytes())


READ = dict(
    avatar=load_avatar,
    generator=from_pretrained,
    refinement=lambda path: kept('refinement').load(path),
    training=lambda path: kept('training').load(path),
)


KINDS = tuple(READ)


def prepare():
    "All sound files, before the first case."
    one = people(mono(64, instants=3), 1)[0].frames
    many = people(multi(64, instants=2, cameras=3), 1)[0].frames
    torch.save(one, samples() / 'one.frames')
    torch.save(many, samples() / 'many.frames')
    new_avatar(open_head(), 16).save(samples() / 'avatar.safetensors')
    generator().save(samples() / 'generator.safetensors')
    for kind, run in dict(refinement=painted_refinement(), training=painted_training()).items():
        run.save(samples() / f'{kind}.safetensors')
        (samples() / kind).write_bytes(pickle.dumps(run))


def warm():
    "What every case needs alike."
    for kind in KINDS:
        sound(kind)
    kept('refinement')
    kept('training')


# ---- bent ones


def headed(kind, meta):
    "Metadata with another header: text as it comes, or a change of the header's dict."
    key, text = next(iter(sound(kind)[1].items()))
    return {key: meta if isinstance(meta, str) else json.dumps(meta(json.loads(text)))}


def bent(kind, change=None, meta=None):
    "A maker of a file with other tensors, or another header."

    def make(folder):
        tensors, header = dict(sound(kind)[0]), sound(kind)[1]
        if change:
            change(tensors)
        header = header if meta is None else headed(kind, meta)
        return written(folder / f'{kind}.safetensors', safetensors(tensors, header))

    return make


def put(name, value):
    "A change of the header: value under a name; None takes it away."

    def change(meta):
        if value is None:
            return {k: v for k, v in meta.items() if k != name}
        return {**meta, name: value}

    return change


def tensor(name, value):
    "A change of a tensor: a function of it; None takes it away."

    def change(tensors):
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors.get(name))

    return change


def first(value):
    "The array with another first number."

    def change(array):
        array = np.array(array, copy=True)
        array.flat[0] = value
        return array

    return change


def raw(kind, header, body=b''):
    "A maker of a file whose first part is anything."

    def make(folder):
        return written(folder / f'{kind}.safetensors', header() + body)

    return make


def promise(size):
    return lambda: size.to_bytes(8, 'little') + b'{}'


def with_header(text):
    return lambda: safetensors({}, None, header=text)


def one_tensor(**about):
    "A header of one tensor that is not what it says."
    entry = dict(dtype='F32', shape=[3], data_offsets=[0, 12]) | about
    return with_header(json.dumps(dict(offsets=entry)).encode())


CONTAINER = {
    'a header of 10^18 bytes': ('number', promise(10**18)),
    'a header of 2^64 - 1 bytes': ('number', promise(2**64 - 1)),
    'a header of nothing': ('cut', promise(0)),
    'a header nested 100,000 deep': ('bomb', with_header(b'[' * DEEP + b']' * DEEP)),
    'a header that is a list': ('kind', with_header(b'[1, 2]')),
    'a header in UTF-16': ('text', with_header('{}'.encode('utf-16'))),
    'a shape of 10^12 rows': ('number', one_tensor(shape=[10**12])),
    'a shape that overflows 64 bits': ('number', one_tensor(shape=[2**40, 2**40])),
    'a shape of -3': ('number', one_tensor(shape=[-3])),
    'offsets beyond the file': ('number', one_tensor(data_offsets=[10**9, 10**9 + 12])),
    'offsets backwards': ('number', one_tensor(data_offsets=[12, 0])),
    'a type nobody knows': ('kind', one_tensor(dtype='F33')),
    'numbers of 4 bits': ('kind', one_tensor(dtype='F4', shape=[24])),
}
HEADERS = {  # of every kind of ours
    'no header of ours': ('kind', '{}'),
    'a header nested 100,000 deep inside': ('bomb', '[' * DEEP + ']' * DEEP),
    'a header of a million digits': ('number', '{"schema": ' + '9' * 10**6 + '}'),
    'a header that is text': ('kind', '"hello"'),
    'a header that is no JSON': ('kind', 'hello'),
    'a schema of text': ('kind', put('schema', '1')),
    'a schema of true': ('kind', put('schema', True)),
    'a schema of 1.5': ('number', put('schema', 1.5)),
    'a schema of -1': ('number', put('schema', -1)),
    'a schema of 10^30': ('number', put('schema', 10**30)),
    'no schema': ('kind', put('schema', None)),
    'a head that is a list': ('kind', put('head', [1])),
    'a head full of escapes': ('text', put('head', ESCAPES)),
    'no head': ('kind', put('head', None)),
}
AVATAR_HEADERS = {
    'resolution -7': ('number', put('resolution', -7)),
    'resolution 10^9': ('number', put('resolution', 10**9)),
    'resolution as text': ('kind', put('resolution', '16')),
    'resolution of true': ('kind', put('resolution', True)),
    'resolution 16.5': ('number', put('resolution', 16.5)),
    'no resolution': ('kind', put('resolution', None)),
    'info that is a list': ('kind', put('info', [1])),
    'no info': ('kind', put('info', None)),
    'another head, named with escapes': (
        'text',
        lambda m: m | dict(head='0' * 16, head_name=ESCAPES),
    ),
    'another head, named by a list': (
        'kind',
        lambda m: m | dict(head='0' * 16, head_name=[ESCAPES]),
    ),
}
AVATAR_TENSORS = {
    'offsets of NaN': ('number', tensor('offsets', first(math.nan))),
    'offsets of 1e30': ('number', tensor('offsets', first(1e30))),
    'offsets of whole numbers': ('kind', tensor('offsets', lambda x: x.astype(np.int64))),
    'offsets of truths': ('kind', tensor('offsets', lambda x: x > 0)),
    'offsets turned over': ('kind', tensor('offsets', lambda x: x.T)),
    'no offsets': ('kind', tensor('offsets', None)),
    'turns of zero': ('number', tensor('quats', lambda x: x * 0)),
    'turns of 1e30': ('number', tensor('quats', first(1e30))),
    'sizes of e^88': ('number', tensor('log_scales', first(88.0))),
    'sizes of e^1e30': ('number', tensor('log_scales', first(1e30))),
    'opacities of infinity': ('number', tensor('logit_opacities', first(math.inf))),
    'opacities of 1e30': ('number', tensor('logit_opacities', first(1e30))),
    'colours of 1e30': ('number', tensor('sh0', first(1e30))),
    'triangle -1': ('number', tensor('face_ids', first(-1))),
    'triangle 10^9': ('number', tensor('face_ids', first(10**9))),
    'triangles of fractions': ('kind', tensor('face_ids', lambda x: x.astype(np.float32))),
    'triangles of 32 bits, one beyond': (
        'number',
        tensor('face_ids', lambda x: first(10**9)(x.astype(np.int32))),
    ),
    'corners of 1e20': ('number', tensor('bary', first(1e20))),
    'corners that sum to 3': ('number', tensor('bary', lambda x: x * 0 + 1)),
    'corners of -5': ('number', tensor('bary', first(-5.0))),
    'texels of 1e9': ('number', tensor('texels', lambda x: first(10**9)(x))),
    'texels of -1': ('number', tensor('texels', lambda x: first(-1)(x))),
    'a shape of 1e30': ('number', tensor('shape', first(1e30))),
    'an offset of 1e30 metres': ('number', tensor('static_offset', first(1e30))),
    'a static offset of other vertices': ('kind', tensor('static_offset', lambda x: x[:-1])),
    'seen of NaN': ('number', tensor('seen', first(math.nan))),
    'seen of 1e30': ('number', tensor('seen', first(1e30))),
    'a tensor named with escapes': (
        'text',
        tensor(ESCAPES, lambda _: np.full(3, np.nan, np.float32)),
    ),
    'a scalar for the triangles': ('kind', tensor('face_ids', lambda x: np.array(3))),
}


def config(name, value):
    "A change of a generator's configuration."
    return lambda meta: {**meta, 'config': {**meta['config'], name: value}}


GENERATOR = {
    'a configuration of text': ('kind', put('config', 'tiny')),
    'no configuration': ('kind', put('config', None)),
    'an empty configuration': ('kind', put('config', {})),
    'pictures of -64 pixels': ('number', config('image_size', -64)),
    'pictures of 10^9 pixels': ('bomb', config('image_size', 10**9)),
    'pictures of text': ('kind', config('image_size', '64')),
    'pictures of true': ('kind', config('image_size', True)),
    'a grid of 10^7 texels': ('bomb', config('resolution', 10**7)),
    'a grid of -1 texels': ('number', config('resolution', -1)),
    'a grid of 1e308': ('number', config('resolution', 1e308)),
    'shells of text': ('kind', config('shells', ['a'])),
    'a million shells': ('bomb', config('shells', [0.0] * 10**6)),
    'a word nobody knows': ('kind', config('backbone', ESCAPES)),
}
STATES = {
    'step as text': ('kind', put('step', '3')),
    'step -1': ('number', put('step', -1)),
    'step 10^30': ('number', put('step', 10**30)),
    'step 1e308': ('number', put('step', 1e308)),
    'no step': ('kind', put('step', None)),
    'a log that is text': ('kind', put('log', 'hello')),
    'a log of numbers': ('kind', put('log', [1, 2])),
    'no log': ('kind', put('log', None)),
    'made of text': ('kind', put('made_of', ESCAPES)),
    'made of other things': ('text', put('made_of', {ESCAPES: ESCAPES, 'clip': ESCAPES})),
    'made of nothing': ('kind', put('made_of', None)),
}
TRAINING = {
    'phase 99': ('number', put('phase', 99)),
    'phase -1': ('number', put('phase', -1)),
    'phase as text': ('kind', put('phase', '0')),
    'no phase': ('kind', put('phase', None)),
    'seconds as text': ('kind', put('seconds', 'long')),
}
DICE = {
    'dice of three bytes': ('kind', tensor('rng', lambda x: x[:3])),
    'dice of fractions': ('kind', tensor('rng', lambda x: x.astype(np.float32))),
    'no dice': ('kind', tensor('rng', None)),
}


def one_of(tensors, prefix):
    return next(name for name in tensors if name.startswith(prefix))


def weight_cases(kind, prefix):
    "Cases of one of the many tensors that are alike."

    def at(value):
        return lambda tensors: tensor(one_of(tensors, prefix), value)(tensors)

    bends = {
        'a weight of NaN': ('number', at(first(math.nan))),
        'a weight of another shape': ('kind', at(lambda x: np.zeros((3, 3), np.float32))),
        'weights of truths': ('kind', at(lambda x: x > 0)),
        'a weight that is missing': ('kind', at(None)),
    }
    return [
        case(kind, what, threat, bent(kind, change)) for what, (threat, change) in bends.items()
    ]


def case(kind, what, threat, make, **more):
    return Case(kind, threat, what, make, READ[kind], **more)


def shared_cases(kind):
    "What every kind must stand."
    states = 'refinement', 'training'  # say what they are made of, not their head alone
    skip = ('a head that is a list', 'a head full of escapes', 'no head') if kind in states else ()
    found = [case(kind, w, t, raw(kind, head, bytes(64))) for w, (t, head) in CONTAINER.items()]
    found += [
        case(kind, w, t, bent(kind, meta=m)) for w, (t, m) in HEADERS.items() if w not in skip
    ]
    name = f'{kind}.safetensors'
    found += [case(kind, f'is {w}', t, instead(m, name)) for w, (t, m) in INSTEAD.items()]
    return found + [case(kind, 'cut in the middle', 'cut', cut(kind))]


def cut(kind):
    def make(folder):
        path = bent(kind)(folder)
        return written(path, path.read_bytes()[:-100])

    return make


TENSOR_FILES = [
    *(case(kind, 'a sound one', SOUND, bent(kind), want=HARMLESS) for kind in KINDS),
    *(c for kind in KINDS for c in shared_cases(kind)),
    *(case('avatar', w, t, bent('avatar', meta=m)) for w, (t, m) in AVATAR_HEADERS.items()),
    *(case('avatar', w, t, bent('avatar', c)) for w, (t, c) in AVATAR_TENSORS.items()),
    *(case('generator', w, t, bent('generator', meta=m)) for w, (t, m) in GENERATOR.items()),
    *weight_cases('generator', ''),
    *(
        case(kind, w, t, bent(kind, meta=m))
        for kind in ('refinement', 'training')
        for w, (t, m) in STATES.items()
    ),
    *(case('training', w, t, bent('training', meta=m)) for w, (t, m) in TRAINING.items()),
    *(case(k, w, t, bent(k, c)) for k in ('refinement', 'training') for w, (t, c) in DICE.items()),
    *weight_cases('refinement', 'delta.'),
    *weight_cases('training', 'weights.'),
]

# ---- text of strangers where people read it


def bare_avatar():
    return new_avatar(open_head(), 16)


def page_of(title):
    "A page with a stranger's title; its text."
    avatar = bare_avatar()
    avatar.info.update(photo=MARKUP, name=MARKUP)
    return write_page(avatar, Path('../out/page.html'), title, motions={}).read_text()


def runs_markup(page):
    return 'the page holds live markup' if '<script>alert' in page or '<img src=x' in page else ''


def filled_twice(page):
    return 'the title was read as a template' if page.count('"arrays":') > 1 else runs_markup(page)


PAGES = [
    Case('page', 'text', 'a title of markup', lambda _: MARKUP, page_of, HARMLESS, runs_markup),
    Case(
        'page',
        'text',
        'a title like a template',
        lambda _: '{{header}}{{bytes}}{{script}}',
        page_of,
        HARMLESS,
        filled_twice,
    ),
    Case(
        'page',
        'text',
        'a title of escapes',
        lambda _: ESCAPES,
        page_of,
        HARMLESS,
        lambda page: 'escapes in the page' if '\x1b' in page else '',
    ),
]

# ---- results


GOOD_LINE = dict(
    method='ours',
    protocol='p',
    subject='s',
    driver='s',
    seed=0,
    scores=dict(psnr=30.0),
    preset=dict(name='paper'),
    split={},
    data='d',
    code='c',
)


def lines(*rows):
    "A maker of a file of results; a dict changes the good line."
    texts = [r if isinstance(r, (str, bytes)) else json.dumps(GOOD_LINE | r) for r in rows]
    data = b'\n'.join(t.encode() if isinstance(t, str) else t for t in texts) + b'\n'
    return file('results.jsonl', data)


def table_of(path):
    return result_table(Results(path).lines)


def has_escapes(text):
    from .room import unprintable

    bad = set(unprintable(text)) - {'\n'}
    return f'prints {min(bad)!r}' if bad else ''


LINES = {
    'scores that are text': ('kind', lines(dict(scores='good'), {})),
    'a score that is text': ('kind', lines(dict(scores=dict(psnr='30')), {})),
    'a score of true': ('kind', lines(dict(scores=dict(psnr=True)), {})),
    'a score of 10^400': ('number', lines(dict(scores=dict(psnr=10**400)), {})),
    'a score of infinity': ('number', lines(dict(scores=dict(psnr=math.inf)), {})),
    'a judged score without a value': (
        'kind',
        lines(dict(scores=dict(CSIM=dict(estimator='x'))), {}),
    ),
    'a seed that is a list': ('kind', lines(dict(seed=[1]), {})),
    'a seed of 1.5': ('kind', lines(dict(seed=1.5), {})),
    'a method that is a list': ('kind', lines(dict(method=[1]), {})),
    'a preset that is a number': ('kind', lines(dict(preset=3), {})),
    'a line that is a list': ('kind', lines('[1, 2]', {})),
    'a line that is a number': ('kind', lines('7', {})),
    'a line nested 100,000 deep': ('bomb', lines('[' * DEEP + ']' * DEEP, {})),
    'a number of a million digits': ('number', lines('{"method": ' + '9' * 10**6 + '}', {})),
    'no UTF-8': ('text', lines(b'\xff\xfe\x00', {})),
    'UTF-16': ('text', file('results.jsonl', json.dumps(GOOD_LINE).encode('utf-16'))),
    'a torn line in the middle': ('cut', lines('{"method": "ou', {})),
    'a second line of the same': ('kind', lines({}, {})),
    'two that do not belong together': ('text', lines(dict(protocol=ESCAPES), dict(seed=1))),
}
RESULTS = [
    Case('results', SOUND, 'a sound one', lines({}, dict(seed=1)), table_of, HARMLESS),
    *(Case('results', t, w, make, table_of) for w, (t, make) in LINES.items()),
    *(
        Case('results', t, f'is {w}', instead(make, 'results.jsonl'), table_of)
        for w, (t, make) in INSTEAD.items()
        if w != 'a link to nothing'
    ),
    Case(
        'results',
        'text',
        'a method of escapes',
        lines(dict(method=ESCAPES, code=ESCAPES, data=ESCAPES)),
        table_of,
        HARMLESS,
        has_escapes,
    ),
    Case(
        'results',
        'text',
        'a method of table rows',
        lines(dict(method='a | 99.9 |\n| b')),
        table_of,
        HARMLESS,
        lambda text: 'a row was forged' if '\n| b' in text else '',
    ),
]

# ---- looks, journals, reports, sequences


def shelf_in(folder):
    "Looks of a small clip, in a folder with something in it; then what is read of them."
    shelf = Shelf([clip('one')], generator(), folder)
    return [shelf.look(0, i) for i in range(3)]


def looks(**files):
    "A maker of a folder of looks, sound but for some files: bytes, or a function of the path."

    def make(folder):
        there = folder.parent / 'out' / 'looks'
        shutil.copytree(samples() / 'one', there)
        for name, data in files.items():
            path = there / name.replace('_', '.')
            path.unlink()
            data(path) if callable(data) else written(path, data)
        return there

    return make


LOOKS = [
    Case('looks', SOUND, 'a sound one', looks(), shelf_in, HARMLESS),
    *(
        Case('looks', t, w, looks(looks_json=text), shelf_in)
        for w, (t, text) in JSON.items()
        if w
        in ('nested 100,000 deep', 'a number of a million digits', 'null', 'no UTF-8', 'breaks off')
    ),
    *(
        Case('looks', t, f'the title is {w}', looks(looks_json=make), shelf_in)
        for w, (t, make) in INSTEAD.items()
        if w
        in (
            'a folder',
            'a pipe nobody writes to',
            'a link to /dev/zero',
            '10 GB of nothing',
            'noise',
        )
    ),
    *(
        Case('looks', t, f'the numbers are {w}', looks(looks_bin=make), shelf_in)
        for w, (t, make) in INSTEAD.items()
        if w in ('a folder', 'a pipe nobody writes to', 'a link to /dev/zero')
    ),
]


def journal(change):
    "A maker of a half-written clip whose journal is bent: a function of its lines."

    def make(folder):
        frames = Clip([test_formats.our_frame(t) for t in range(3)])
        there = folder.parent / 'out' / 'clip'
        torn = Clip(lambda i: frames[i] if i < 2 else 1 / 0, 3)
        try:
            write_vhap(torn, there, show=False)
        except ZeroDivisionError:
            pass
        path = there / 'writing.jsonl'
        rows = path.read_text().splitlines()
        data = change(rows, path)
        if data is not None:
            path.write_bytes(data if isinstance(data, bytes) else data.encode())
        (folder.parent / 'secret.png').write_bytes(b'secret')
        return frames, there

    return make


def bent_line(row, change):
    "A line of a journal with its entry changed; ... takes a value away."
    line = json.loads(row)
    entry = line['entry'] | change
    return json.dumps(line | dict(entry={k: v for k, v in entry.items() if v is not ...}))


def second(**change):
    "The journal with the entry of the first frame changed."

    def bend(rows, _):
        return '\n'.join([rows[0], bent_line(rows[1], change), *rows[2:]]) + '\n'

    return bend


def third(**change):
    "The journal with the entry of the second frame changed."

    def bend(rows, _):
        return '\n'.join([*rows[:2], bent_line(rows[2], change)]) + '\n'

    return bend


def swap(make):
    def bend(rows, path):
        path.unlink()
        make(path)

    return bend


def raw_line(text):
    return lambda rows, _: '\n'.join([rows[0], text]) + '\n'


JOURNALS = {
    'leads out of the folder': ('path', third(file_path='../../secret.png')),
    'a first frame that leads out': ('path', second(file_path='../../secret.png')),
    'parameters that lead out': ('path', third(flame_param_path='../../../etc/passwd')),
    'a time of text': ('kind', third(timestep_index='1')),
    'a time of 10^400': ('number', third(timestep_index=10**400)),
    'no time': ('kind', third(timestep_index=..., timestep_index_original=...)),
    'a camera that is a list': ('kind', third(camera_id=[1])),
    'no camera': ('kind', third(camera_id=..., camera_index=...)),
    'an entry that is a list': ('kind', raw_line('[1]')),
    'an entry that is null': ('kind', raw_line('null')),
    'an entry nested 100,000 deep': ('bomb', raw_line('[' * DEEP + ']' * DEEP)),
    'no UTF-8': ('text', lambda rows, _: b'\xff\xfe\n'),
    'more entries than frames': (
        'number',
        lambda rows, _: '\n'.join([*rows, rows[2], rows[2], rows[2]]) + '\n',
    ),
    'a folder instead': ('kind', swap(INSTEAD['a folder'][1])),
    'a pipe instead': ('path', swap(INSTEAD['a pipe nobody writes to'][1])),
    'a link to /dev/zero': ('path', swap(INSTEAD['a link to /dev/zero'][1])),
}
JOURNAL = [
    Case('journal', t, w, journal(change), lambda given: write_vhap(*given, show=False))
    for w, (t, change) in JOURNALS.items()
]


def report(data):
    "A maker of a clip's folder with a report of its tracking."

    def make(folder):
        path = folder / 'tracking.json'
        data(path) if callable(data) else written(path, data)
        return folder

    return make


REPORTS = [
    Case(
        'tracking.json',
        SOUND,
        'a sound one',
        report('{"landmarks": 1.5, "fps": 25.0, "cuts": [3]}'),
        pipeline._tracking_numbers,
        HARMLESS,
    ),
    *(
        Case('tracking.json', t, w, report(text), pipeline._tracking_numbers)
        for w, (t, text) in JSON.items()
    ),
    *(
        Case('tracking.json', t, f'is {w}', report(make), pipeline._tracking_numbers)
        for w, (t, make) in INSTEAD.items()
    ),
    Case(
        'tracking.json',
        'kind',
        'landmarks of text',
        report('{"landmarks": "\\u001b[2J", "fps": []}'),
        pipeline._tracking_numbers,
    ),
    Case(
        'tracking.json',
        'number',
        'landmarks of NaN',
        report('{"landmarks": NaN, "held_out": 1, "fps": 25, "cuts": []}'),
        pipeline._tracking_numbers,
    ),
]


def sequence(data):
    def make(folder):
        path = folder.parent / 'out' / 'frames' / 'sequence.json'
        path.parent.mkdir(parents=True)
        data(path) if callable(data) else written(path, data)
        return path.parent

    return make


def write_frames(folder):
    return write_sequence(bare_avatar(), [pose_of(open_head(), {})], folder)


SEQUENCES = [
    *(
        Case('sequence.json', t, f'is {w}', sequence(make), write_frames)
        for w, (t, make) in INSTEAD.items()
        if w
        in (
            'a folder',
            'a pipe nobody writes to',
            'a link to /dev/zero',
            'a socket',
            'a link to itself',
        )
    ),
    Case('sequence.json', 'text', 'no UTF-8', sequence(b'\xff\xfe'), write_frames, HARMLESS),
]

# ---- YAML: protocols and manifests


def laughing():
    "The billion laughs: aliases of aliases."
    rows = ['a0: &a0 [x, x, x, x, x, x, x, x, x]']
    rows += [f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * 9)}]' for i in range(1, 12)]
    return '\n'.join([*rows, 'protocols: *a11', 'assets: *a11']) + '\n'


YAML = {
    'runs a command': ('code', '!!python/object/apply:os.system ["touch ../CANARY"]\n'),
    'makes an object': ('code', 'protocols: !!python/object/new:os.system ["touch ../CANARY"]\n'),
    'a billion laughs': ('bomb', laughing()),
    'nested 10,000 deep': ('bomb', '[' * 10_000 + ']' * 10_000),
    'a list': ('kind', '- 1\n- 2\n'),
    'a number': ('kind', '7\n'),
    'nothing': ('cut', ''),
    'no UTF-8': ('text', b'\xff\xfe\xc0'),
    'control characters': ('text', 'protocols: "\x1b[2J"\nassets: "\x07"\n'),
    'a list of numbers': ('kind', 'protocols: [1, 2]\nassets: [1, 2]\n'),
    'a list of lists': ('kind', 'protocols: [[1]]\nassets: [[1]]\n'),
    'text for a list': ('kind', 'protocols: hello\nassets: hello\n'),
    'entries with escapes for keys': (
        'text',
        'protocols: [{"\\e[2J": 1}]\nassets: [{"\\e[2J": 1}]\n',
    ),
    'refers to itself': ('bomb', 'protocols: &a [*a]\nassets: &b [*b]\n'),
}
ASSET = dict(
    id='x',
    what='w',
    licence='l',
    who='all',
    file='x.bin',
    sources=[],
    needed_by=[],
    without='nothing',
)


def manifest(**change):
    entry = {k: v for k, v in (ASSET | change).items() if v is not ...}
    return file('data_manifest.yaml', json.dumps(dict(assets=[entry])))


MANIFESTS = {
    'a file that leads up': ('path', manifest(file='../../x.bin')),
    'a file at the root': ('path', manifest(file='/etc/passwd')),
    'a file that is a list': ('kind', manifest(file=['x'])),
    'a file with NUL': ('text', manifest(file='a\0b')),
    'a file with escapes': ('text', manifest(file=ESCAPES)),
    'an id that is a list': ('kind', manifest(id=[1])),
    'an id with escapes': ('text', manifest(id=ESCAPES)),
    'no sources': ('kind', manifest(sources=...)),
    'sources of text': ('kind', manifest(sources='http://x')),
    'sources of numbers': ('kind', manifest(sources=[1])),
    'an option for pip': ('code', manifest(sources=[dict(pip='--index-url=http://x y')])),
    'a link to a local file': ('path', manifest(sources=[dict(url='file:///etc/passwd')])),
    'a package member that leads up': ('path', manifest(sources=[dict(package='../../x')])),
    'bytes of -1': ('number', manifest(bytes=-1)),
    'bytes of text': ('kind', manifest(bytes='many')),
    'sha256 of two letters': ('kind', manifest(sha256='ab')),
    'a key nobody knows': ('kind', manifest(**{ESCAPES: 1})),
}


def twice(folder):
    return written(folder / 'data_manifest.yaml', json.dumps(dict(assets=[ASSET, ASSET])))


YAMLS = [
    *(
        Case('protocols', t, w, file('p.yaml', text), load_protocols)
        for w, (t, text) in YAML.items()
    ),
    *(Case('manifest', t, w, file('m.yaml', text), load_manifest) for w, (t, text) in YAML.items()),
    *(Case('manifest', t, w, make, load_manifest) for w, (t, make) in MANIFESTS.items()),
    Case('manifest', 'kind', 'an id that comes twice', twice, load_manifest),
    *(
        Case(kind, t, f'is {w}', instead(make, 'x.yaml'), read)
        for kind, read in (('protocols', load_protocols), ('manifest', load_manifest))
        for w, (t, make) in INSTEAD.items()
    ),
]
JOURNAL.append(
    Case('journal', SOUND, 'a sound one', journal(lambda rows, _: None), JOURNAL[0].read, HARMLESS)
)
CASES = TENSOR_FILES + PAGES + RESULTS + LOOKS + JOURNAL + REPORTS + SEQUENCES + YAMLS
