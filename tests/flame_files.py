"""Files in FLAME's own encodings, written from scratch: what Python 2, numpy 1.11, scipy 0.17 and
chumpy left behind."""

import struct

import numpy as np
import scipy.sparse


class Made:
    "An instance of a class that need not exist here."

    def __init__(self, module, name, **state):
        self.module = module
        self.name = name
        self.state = state


def ch(x):
    return Made(
        'chumpy.ch', 'Ch', x=x, _dirty_vars=set(), _itr=None, _depends_on_deps={}, _cached_parms={}
    )


def select(x, seed=0):
    "The same numbers as a chumpy selection out of a larger, shuffled array."
    r = np.random.default_rng(seed)
    n = x.size
    places = r.permutation(2 * n)[:n]
    big = r.normal(size=2 * n)
    big[places] = x.ravel()
    return Made(
        'chumpy.reordering',
        'Select',
        a=ch(big.reshape(2, n)),
        idxs=places,
        preferred_shape=x.shape,
        _dirty_vars={'a'},
    )


def csc(x):
    m = scipy.sparse.csc_matrix(x)
    return Made(
        'scipy.sparse.csc',
        'csc_matrix',
        _shape=m.shape,
        maxprint=50,
        data=m.data,
        indices=m.indices,
        indptr=m.indptr,
        format='csc',
    )


class Python2:
    """Writes pickles as Python 2's cPickle did: byte strings, old module names, the memo used for
    whatever comes twice."""

    def __init__(self, protocol):
        self.protocol = protocol
        self.memo = {}
        self.keep = []

    def dumps(self, x):
        return (b'\x80\x02' if self.protocol == 2 else b'') + self.write(x) + b'.'

    def put(self, x, code):
        "What makes x, and the instruction that keeps it in the memo."
        n = self.memo[id(x)] = len(self.memo)
        self.keep.append(x)
        return code + self.memo_at(n, b'p', b'q', b'r')

    def memo_at(self, n, as_text, as_byte, as_long):
        "An instruction with a place in the memo."
        if self.protocol == 0:
            return as_text + b'%d\n' % n
        return as_byte + bytes([n]) if n < 256 else as_long + struct.pack('<I', n)

    def write(self, x):
        if id(x) in self.memo:
            return self.memo_at(self.memo[id(x)], b'g', b'h', b'j')
        if x is None:
            return b'N'
        if isinstance(x, bool):
            return self.truth(x)
        if isinstance(x, int):
            return self.number(x)
        if isinstance(x, float):
            return b'F%r\n' % x if self.protocol == 0 else b'G' + struct.pack('>d', x)
        if isinstance(x, (str, bytes)):
            return self.put(x, self.text(x.encode() if isinstance(x, str) else x))
        return self.put(x, getattr(self, type(x).__name__)(x))

    def truth(self, x):
        if self.protocol == 2:
            return b'\x88' if x else b'\x89'
        return b'I01\n' if x else b'I00\n'

    def number(self, x):
        if self.protocol == 0 or not -(2**31) <= x < 2**31:
            return b'I%d\n' % x
        if 0 <= x < 256:
            return b'K' + bytes([x])
        return b'M' + struct.pack('<H', x) if 0 <= x < 2**16 else b'J' + struct.pack('<i', x)

    def text(self, x):
        if self.protocol == 0:
            return b'S' + repr(x)[1:].encode() + b'\n'
        return b'U' + bytes([len(x)]) + x if len(x) < 256 else b'T' + struct.pack('<i', len(x)) + x

    def tuple(self, x):
        items = b''.join(map(self.write, x))
        if self.protocol == 2 and 1 <= len(x) <= 3:
            return items + b'\x85\x86\x87'[len(x) - 1 : len(x)]
        return b')' if self.protocol and not x else b'(' + items + b't'

    def list(self, x):
        if self.protocol == 0:
            return b'(l' + b''.join(self.write(i) + b'a' for i in x)
        return b']' + (b'(' + b''.join(map(self.write, x)) + b'e' if x else b'')

    def dict(self, x):
        pairs = [self.write(k) + self.write(v) for k, v in x.items()]
        if self.protocol == 0:
            return b'(d' + b''.join(p + b's' for p in pairs)
        return b'}' + (b'(' + b''.join(pairs) + b'u' if pairs else b'')

    def call(self, module, name, *args):
        return self.name(module, name) + self.write(args) + b'R'

    def name(self, module, name):
        return b'c' + module.encode() + b'\n' + name.encode() + b'\n'

    def set(self, x):
        return self.call('__builtin__', 'set', sorted(x))

    def ndarray(self, x):
        kind = self.name('numpy', 'ndarray') + self.write((0,)) + self.write('b')
        start = b'(' + kind + b't' if self.protocol < 2 else kind + b'\x87'
        made = self.name('numpy.core.multiarray', '_reconstruct') + start + b'R'
        order = 'F' if x.flags.fnc else 'C'
        state = 1, x.shape, Dtype(x.dtype), bool(x.flags.fnc), x.tobytes(order)
        return made + self.write(state) + b'b'

    def Dtype(self, x):
        dtype = x.dtype
        order = '|' if dtype.itemsize == 1 else '<'
        made = self.call('numpy', 'dtype', dtype.str[1:], 0, 1)
        return made + self.write((3, order, None, None, None, -1, -1, 0)) + b'b'

    def Made(self, x):
        cls = self.name(x.module, x.name)
        if self.protocol == 2:
            new = cls + b')\x81'
        else:
            base = self.name('__builtin__', 'object') + b'NtR'
            new = self.name('copy_reg', '_reconstructor') + b'(' + cls + base
        return new + self.write(x.state) + b'b'


class Dtype:
    def __init__(self, dtype):
        self.dtype = dtype


def skin_faces(r, V, F):
    "F triangles on V vertices."
    if V < 1000:
        return r.permuted(np.tile(np.arange(V), (F, 1)), axis=1)[:, :3]
    steps = (1, 0), (1, 1), (1, 7)
    return np.stack([(np.arange(F) * k + start) % V for k, start in steps], 1)


def model(V=60, F=100, columns=400, seed=0, kintree=np.uint32):
    "Random arrays of FLAME's form, as plain numpy; the last 20 vertices are two eyeballs."
    r = np.random.default_rng(seed)
    regressor = np.zeros((5, V))
    for row in regressor:
        row[r.choice(V, 20, replace=False)] = 1 / 20
    fan = np.array([[0, i + 1, i + 2] for i in range(8)])
    faces = np.concatenate([skin_faces(r, V - 20, F - 16), V - 20 + fan, V - 10 + fan])
    weights = r.dirichlet(np.ones(5), V)
    weights[-20:] = 0
    weights[-20:-10, 3] = 1
    weights[-10:, 4] = 1
    return dict(
        v_template=r.normal(size=(V, 3)) * 0.1,
        f=faces.astype(np.uint32),
        shapedirs=r.normal(size=(V, 3, columns)) * 1e-3,
        posedirs=r.normal(size=(V, 3, 36)) * 1e-3,
        J_regressor=regressor,
        weights=weights,
        kintree_table=np.array([[2**32 - 1, 0, 1, 1, 1], range(5)]).astype(kintree),
    )


def original(m):
    """The same arrays as FLAME's authors saved them: chumpy here and there, a sparse regressor, a
    few keys nobody needs."""
    return dict(
        m,
        v_template=ch(m['v_template']),
        shapedirs=select(m['shapedirs']) if m['shapedirs'].size < 10**6 else ch(m['shapedirs']),
        posedirs=ch(np.asfortranarray(m['posedirs'])),
        weights=ch(m['weights']),
        J_regressor=csc(m['J_regressor']),
        J=ch(m['J_regressor'] @ m['v_template']),
        bs_style='lbs',
        bs_type='lrotmin',
    )


def write_original(path, m, protocol=2):
    path.write_bytes(Python2(protocol).dumps(original(m)))
    return path
