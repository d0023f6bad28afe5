"""Files of arrays that other programs wrote: pickles, npz, npy, torch files, FLAME's folders."""

import gzip
import io
import pickle
import zipfile

import flame_files as ff
import numpy as np
import torch
from test_flame import BOMBS, EVIL

from spatialavatar0.ground.pickles import read_arrays
from spatialavatar0.head.flame_files import load_flame
from spatialavatar0.pictures.formats import read_checkpoint

from .make import (
    ESCAPES,
    INSTEAD,
    Order,
    file,
    instead,
    npy,
    raw_zip,
    sparse,
    touch,
    written,
    zeros_zip,
    zipped,
)
from .room import HARMLESS, SOUND, Case

# ---- pickles


def dumped(protocol):
    "An order to make the canary, in any of Python's protocols."
    return lambda folder: written(folder / 'x.pkl', pickle.dumps(touch(folder), protocol))


def laughs():
    "Lists of lists of lists, a million million at the end, in 400 bytes."
    inside = b''.join(b'h%c' % (i - 1) * 10 + b'e' for i in range(0))
    levels = b']q\x00(K\x01K\x02e0'
    for i in range(1, 13):
        levels += b']q%c(' % i + b'h%c' % (i - 1) * 10 + b'e0'
    return b'\x80\x02' + inside + levels + b'h\x0c.'


def nested(folder):
    "A pickle inside numpy's scalar of objects: two doors, one behind the other."
    inner = pickle.dumps(touch(folder), 2)
    arrays = dict(v_template=Order(np.dtype, 'O'), x=inner)
    return written(folder / 'x.pkl', pickle.dumps(arrays, 2))


PICKLES = [
    *(
        Case('pickle', 'code', f'calls: {what}', file('x.pkl', EVIL[what]), read_arrays)
        for what in EVIL
    ),
    *(
        Case('pickle', 'bomb', what, file('x.pkl', BOMBS[what]), read_arrays)
        for what in BOMBS
        if what != 'copies'
    ),
    *(
        Case('pickle', 'code', f'os.system, protocol {n}', dumped(n), read_arrays)
        for n in range(pickle.HIGHEST_PROTOCOL + 1)
    ),
    Case('pickle', 'bomb', 'lists of lists, 10^12', file('x.pkl', laughs), read_arrays, HARMLESS),
    Case('pickle', 'code', 'a type of objects as a value', nested, read_arrays, HARMLESS),
    Case(
        'pickle',
        'text',
        'asks for a name full of escapes',
        file('x.pkl', b'c' + ESCAPES.split('\n')[0].encode() + b'\nx\n.'),
        read_arrays,
    ),
    Case(
        'pickle',
        'bomb',
        'packed with gzip',
        file('x.pkl', gzip.compress(bytes(10**7))),
        read_arrays,
    ),
    *(
        Case('pickle', threat, f'is {what}', instead(make, 'x.pkl'), read_arrays)
        for what, (threat, make) in INSTEAD.items()
    ),
]

# ---- npz and npy


def objects(folder):
    "An .npz whose array is a pickle."
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, dict(descr='|O', fortran_order=False, shape=()))
    return head.getvalue() + pickle.dumps(touch(folder), 2)


def object_npz(folder):
    return written(folder / 'x.npz', zipped([('v_template.npy', objects(folder))]))


def object_npy(folder):
    return written(folder / 'x.npy', objects(folder))


def many_members():
    "Very many arrays of nothing."
    return zipped([(f'{i}.npy', npy('(0,)')) for i in range(50_000)])


def climbing():
    "Names that lead up; nothing may be unpacked to disk."
    return zipped([('../../CANARY.npy', npy('(1,)', bytes(8))), ('/etc/x.npy', npy('(0,)'))])


def locked():
    return raw_zip('x.npy', npy('(1,)', bytes(8)), 136, method=0, flags=1)


def odd_method():
    return raw_zip('x.npy', npy('(1,)', bytes(8)), 136, method=99)


def deep_header():
    return npy('(' * 3000 + ')' * 3000)


def long_header():
    "Numpy parses the header as Python: a sum of very many terms."
    return npy('(' + '1+' * 40_000 + '1,)', version=b'\x02\x00')


def torn_npz():
    data = zipped([('x.npy', npy('(100,)', bytes(800)))])
    return data[: len(data) // 2]


NPZ = {
    'an array of objects': ('code', object_npz),
    'an array of objects, .npy': ('code', object_npy),
    'unfolds to 10 GB': ('bomb', file('x.npz', lambda: zeros_zip('x.npy'))),
    'a header of 10^12 numbers': ('bomb', file('x.npy', npy(f'({10**12},)', bytes(80)))),
    'a header of 10^30 numbers': ('number', file('x.npy', npy(f'({10**30},)', bytes(80)))),
    'a header of -1 numbers': ('number', file('x.npy', npy('(-1,)', bytes(80)))),
    'a header 3,000 deep': ('bomb', file('x.npy', deep_header)),
    'a header that is a long sum': ('bomb', file('x.npy', long_header)),
    'a header that calls': ('code', file('x.npy', npy('(__import__("os").getpid(),)', bytes(80)))),
    'a type of a million letters': ('bomb', file('x.npy', npy('(2,)', bytes(80), "'S1000000000'"))),
    'fields for numbers': (
        'kind',
        file('x.npy', npy('(2,)', bytes(32), "[('a','<f8'),('b','<f8')]")),
    ),
    'times for numbers': ('kind', file('x.npy', npy('(2,)', bytes(16), "'<M8[s]'"))),
    'format 9': ('kind', file('x.npy', npy('(2,)', bytes(16), version=b'\x09\x00'))),
    'encrypted': ('kind', file('x.npz', locked)),
    'packed in a way nobody knows': ('kind', file('x.npz', odd_method)),
    'a zip of nothing': ('kind', file('x.npz', zipped([]))),
    'a zip of texts': ('kind', file('x.npz', zipped([('a.txt', b'hello')]))),
    'cut in the middle': ('cut', file('x.npz', torn_npz)),
    'starts as a zip, goes on as noise': (
        'cut',
        file('x.npz', b'PK\x03\x04' + bytes(range(256)) * 9),
    ),
}
ARRAYS = [
    *(Case('npz', threat, what, make, read_arrays) for what, (threat, make) in NPZ.items()),
    Case('npz', 'bomb', '50,000 arrays of nothing', file('x.npz', many_members), read_arrays),
    Case('npz', 'path', 'names that lead up', file('x.npz', climbing), read_arrays, HARMLESS),
]

# ---- torch files


def torch_saved(content, **how):
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


def order_inside(folder, **how):
    content = dict(flame=dict(exp=touch(folder)))
    return written(folder / '00000.frame', torch_saved(content, **how))


def bomb_inside():
    "A torch file whose numbers unfold to a gigabyte."
    members = []
    with zipfile.ZipFile(io.BytesIO(torch_saved(dict(x=torch.zeros(9))))) as package:
        members = [(m.filename, package.read(m)) for m in package.infolist()]
    return zipped([*members, ('archive/data/9', bytes(10**9))])


def odd_storage():
    "A tensor larger than what is stored for it."
    data = torch_saved(dict(x=torch.zeros(9)))
    with zipfile.ZipFile(io.BytesIO(data)) as package:
        members = [(m.filename, package.read(m)) for m in package.infolist()]
    # the number of rows stands as K\t (nine) in the pickle
    grown = [
        (n, d.replace(b'K\t\x85', b'K\xff\x85') if n.endswith('.pkl') else d) for n, d in members
    ]
    return zipped(grown, zipfile.ZIP_STORED)


FRAMES = {
    'runs a command': ('code', order_inside),
    'runs a command, the old form': (
        'code',
        lambda folder: order_inside(folder, _use_new_zipfile_serialization=False),
    ),
    'a whole network': ('code', file('x.frame', lambda: torch_saved(torch.nn.Linear(2, 2)))),
    'unfolds to a gigabyte': ('bomb', file('x.frame', bomb_inside)),
    'a tensor larger than its bytes': ('number', file('x.frame', odd_storage)),
    'a tensor alone': ('kind', file('x.frame', lambda: torch_saved(torch.zeros(3)))),
    'a list': ('kind', file('x.frame', lambda: torch_saved([1, 2]))),
    'a zip of something else': ('kind', file('x.frame', zipped([('a.txt', b'hello')]))),
    'cut in the middle': (
        'cut',
        file('x.frame', lambda: torch_saved(dict(x=torch.zeros(99)))[:700]),
    ),
}
TORCH = [
    *(
        Case('torch file', threat, what, make, read_checkpoint)
        for what, (threat, make) in FRAMES.items()
    ),
    *(
        Case('torch file', threat, f'is {what}', instead(make, 'x.frame'), read_checkpoint)
        for what, (threat, make) in INSTEAD.items()
    ),
]

# ---- FLAME


def flame(**change):
    "A maker of a head model with something changed; a function gets the array."

    def make(folder):
        model = ff.model()
        for name, value in change.items():
            model[name] = value(model[name]) if callable(value) else value
        kept = {name: value for name, value in model.items() if value is not None}
        return written(folder / 'generic_model.pkl', pickle.dumps(kept, 2))

    return make


def with_first(value):
    "The array with another first number."

    def change(array):
        array = array.copy()
        array.flat[0] = value
        return array

    return change


def beside(name, data):
    "A maker of a sound model with something odd next to it; the folder."

    def make(folder):
        ff.write_original(folder / 'generic_model.pkl', ff.model())
        target = folder / name
        data(target) if callable(data) else written(target, data)
        return folder

    return make


FACE = ff.model()['f']
OBJ_START = 'vt 0 0\nvt 1 0\nvt 0 1\n'
OBJ_FACES = ''.join(
    'f ' + ' '.join(f'{i + 1}/{k + 1}' for k, i in enumerate(t)) + '\n' for t in FACE.tolist()
)
MODELS = {
    'no template': ('kind', flame(v_template=None)),
    'a text for the template': ('kind', flame(v_template='none')),
    'a list of lists for the template': ('kind', flame(v_template=[[1, 2], [3]])),
    'complex numbers': ('kind', flame(v_template=lambda x: x.astype(complex))),
    'NaN in the template': ('number', flame(v_template=with_first(np.nan))),
    '1e308 in the template': ('number', flame(v_template=with_first(1e308))),
    'endless shapes': ('number', flame(shapedirs=with_first(np.inf))),
    'a triangle of vertex 10^9': ('number', flame(f=with_first(10**9))),
    'triangles of -1': ('number', flame(f=lambda x: with_first(-1)(x.astype(np.int64)))),
    'triangles of fractions': ('kind', flame(f=lambda x: x + 0.5)),
    'no triangles': ('kind', flame(f=lambda x: x[:0])),
    'no vertices': ('kind', flame(v_template=lambda x: x[:0])),
    'weights of NaN': ('number', flame(weights=with_first(np.nan))),
    'weights that sum to 9': ('number', flame(weights=with_first(9.0))),
    'a tree in a circle': ('number', flame(kintree_table=np.array([[1, 0, 1, 1, 1], range(5)]))),
    'a tree of nine': ('kind', flame(kintree_table=np.zeros((2, 9), int))),
    'a parent of 2^60': ('number', flame(kintree_table=np.array([[2**60, 0, 1, 1, 1], range(5)]))),
    'a million expression columns': ('bomb', flame(shapedirs=np.zeros((60, 3, 10**5), np.float32))),
    'a regressor of NaN': ('number', flame(J_regressor=with_first(np.nan))),
    'keys full of escapes': ('text', flame(v_template=None, **{ESCAPES: 1})),
}
BESIDE = {
    'an atlas of 30-digit corners': (
        'number',
        beside('uv.obj', OBJ_START + f'f {10**30}/1 2/2 3/3\n'),
    ),
    'an atlas of NaN': ('number', beside('uv.obj', 'vt nan nan\n' * 3 + OBJ_FACES)),
    'an atlas of 1e400': ('number', beside('uv.obj', 'vt 1e400 0\n' * 3 + OBJ_FACES)),
    'an atlas of corner 0': ('number', beside('uv.obj', OBJ_START + OBJ_FACES.replace('/1', '/0'))),
    'an atlas of letters': ('kind', beside('uv.obj', 'vt a b\n' + OBJ_FACES)),
    'an atlas in UTF-16': ('text', beside('uv.obj', (OBJ_START + OBJ_FACES).encode('utf-16'))),
    'an atlas of 10 GB': ('bomb', beside('uv.obj', sparse)),
    'masks that run a command': (
        'code',
        lambda folder: beside('FLAME_masks.pkl', pickle.dumps(touch(folder)))(folder),
    ),
    'masks beyond the mesh': (
        'number',
        beside('FLAME_masks.pkl', pickle.dumps(dict(face=[10**12]))),
    ),
    'masks of texts': ('kind', beside('FLAME_masks.pkl', pickle.dumps(dict(face=['a'])))),
    'landmarks of triangle -1': (
        'number',
        beside(
            'landmark_embedding.npy',
            lambda path: np.save(
                path,
                dict(full_lmk_faces_idx=np.array([-1]), full_lmk_bary_coords=np.eye(3)[:1]),
                allow_pickle=True,
            ),
        ),
    ),
}


def model_is_a_folder(folder):
    (folder / 'generic_model.pkl').mkdir()
    return folder


FLAME = [
    *(Case('FLAME', threat, what, make, load_flame) for what, (threat, make) in MODELS.items()),
    *(Case('FLAME', threat, what, make, load_flame) for what, (threat, make) in BESIDE.items()),
    Case('FLAME', 'kind', 'the model is a folder', model_is_a_folder, load_flame),
    Case('FLAME', 'kind', 'an empty folder', lambda folder: folder, load_flame),
    *(
        Case('FLAME', threat, f'is {what}', instead(make, 'generic_model.pkl'), load_flame)
        for what, (threat, make) in INSTEAD.items()
        if what != 'a folder'
    ),
]
CONTROLS = [
    Case('FLAME', SOUND, 'a sound one', flame(), load_flame, HARMLESS),
    Case(
        'torch file',
        SOUND,
        'a sound one',
        file('x.frame', lambda: torch_saved(dict(x=torch.zeros(3)))),
        read_checkpoint,
        HARMLESS,
    ),
    Case('npz', SOUND, 'a sound one', file('x.npy', npy('(2,)', bytes(16))), read_arrays, HARMLESS),
]
CASES = CONTROLS + PICKLES + ARRAYS + TORCH + FLAME
