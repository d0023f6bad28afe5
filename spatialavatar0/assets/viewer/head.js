// From sliders to Gaussians in the world: blendshapes, skinning, triangle frames, binding, and their order from the camera.
// Vectors lie flat in typed arrays, metres; matrices row by row. Each function fills arrays made once, so a frame makes no garbage.

class Avatar {
  constructor(header, a) {
    Object.assign(this, a);                                   // rest, basis, weights, triangles, ...: see `pack` in viewer.py
    this.names = header.names; this.parents = header.parents;
    this.numVerts = this.rest.length / 3; this.numTriangles = this.triangles.length / 3; this.count = this.triangle.length;
    this.verts = new Float32Array(this.rest.length);
    this.jointsNow = new Float32Array(this.joints.length);
    this.frames = new Float32Array(10 * this.numTriangles);   // per triangle: axes a0 a1 a2, size
    this.world = new Float32Array(12 * 512 * Math.ceil(this.count / 512)); // per Gaussian: mean, then its three axes times their scales
    this.local = localAxes(this.quats, this.log_scales);
    this.depths = new Float32Array(this.count); this.keys = new Uint16Array(this.count);
    this.buckets = new Uint32Array(65537); this.order = new Uint32Array(this.world.length / 12);  // whole rows of a texture, as `world`
  }

  // weights: one per name; turns: five axis-angle vectors (everything, neck, jaw, left eye, right eye), added to what the weights ask for.
  pose(weights, turns, translation) {
    const { verts, jointsNow } = this, vectors = turns.map(v => v.slice());
    verts.set(this.rest); jointsNow.set(this.joints);
    weights.forEach((w, k) => {
      if (!w) return;
      addScaled(verts, this.basis, k * verts.length, w * this.basis_step[k]);
      addScaled(jointsNow, this.joint_basis, k * jointsNow.length, w);
      for (let d = 0; d < 3; d++) {
        vectors[2][d] += w * this.jaw[3 * k + d];
        vectors[3][d] += w * this.eyes[6 * k + d]; vectors[4][d] += w * this.eyes[6 * k + 3 + d];
      }
    });
    const turned = vectors.map(rotation);
    if (this.pose_basis) this.correct(turned);
    this.skin(turned, translation);
  }

  // FLAME: every turned joint but the first adds a little to the skin around it.
  correct(turned) {
    for (let j = 1; j < turned.length; j++) for (let e = 0; e < 9; e++) {
      const k = 9 * (j - 1) + e, w = turned[j][e] - (e % 4 ? 0 : 1);
      if (w) addScaled(this.verts, this.pose_basis, k * this.verts.length, w * this.pose_basis_step[k]);
    }
  }

  // Linear blend skinning: chain the joints, then move each vertex by the weighted mean of their motions.
  skin(turned, translation) {
    const { verts, weights, jointsNow: p, parents } = this, J = parents.length, turns = [], places = [], motions = new Float32Array(12 * J);
    for (let j = 0; j < J; j++) {
      const at = [p[3 * j], p[3 * j + 1], p[3 * j + 2]], up = parents[j];
      turns[j] = up < 0 ? turned[j] : product(turns[up], turned[j]);
      places[j] = up < 0 ? at : plus(places[up], times(turns[up], [at[0] - p[3 * up], at[1] - p[3 * up + 1], at[2] - p[3 * up + 2]]));
      const back = times(turns[j], at);
      for (let r = 0; r < 3; r++) motions.set([...turns[j].slice(3 * r, 3 * r + 3), places[j][r] - back[r] + translation[r]], 12 * j + 4 * r);
    }
    const m = new Float32Array(12);
    for (let v = 0; v < this.numVerts; v++) {
      m.fill(0);
      for (let j = 0; j < J; j++) {
        const w = weights[J * v + j];
        if (w) for (let e = 0; e < 12; e++) m[e] += w * motions[12 * j + e];
      }
      const x = verts[3 * v], y = verts[3 * v + 1], z = verts[3 * v + 2];
      for (let r = 0; r < 3; r++) verts[3 * v + r] = m[4 * r] * x + m[4 * r + 1] * y + m[4 * r + 2] * z + m[4 * r + 3];
    }
  }

  // Orthonormal axes and size of every triangle: a0 along its first edge, a1 its normal, a2 = a0 x a1.
  frame() {
    const { verts: p, triangles, frames } = this;
    for (let t = 0; t < this.numTriangles; t++) {
      const a = 3 * triangles[3 * t], b = 3 * triangles[3 * t + 1], c = 3 * triangles[3 * t + 2];
      const ex = p[b] - p[a], ey = p[b + 1] - p[a + 1], ez = p[b + 2] - p[a + 2];
      const fx = p[c] - p[a], fy = p[c + 1] - p[a + 1], fz = p[c + 2] - p[a + 2];
      const l = Math.sqrt(ex * ex + ey * ey + ez * ez), i = 1 / Math.max(l, 1e-10), x = ex * i, y = ey * i, z = ez * i;
      let nx = y * fz - z * fy, ny = z * fx - x * fz, nz = x * fy - y * fx;
      const h = Math.sqrt(nx * nx + ny * ny + nz * nz), k = 1 / Math.max(h, 1e-10); nx *= k; ny *= k; nz *= k;
      const o = 10 * t;
      frames[o] = x; frames[o + 1] = y; frames[o + 2] = z; frames[o + 3] = nx; frames[o + 4] = ny; frames[o + 5] = nz;
      frames[o + 6] = y * nz - z * ny; frames[o + 7] = z * nx - x * nz; frames[o + 8] = x * ny - y * nx; frames[o + 9] = (l + h) / 2;
    }
  }

  // Every Gaussian rides on its triangle: mean = point + size * R offset, axes = size * R local axes.
  bind() {
    const { verts: p, triangles, triangle, bary, offsets: o, frames: f, local, world } = this;
    for (let n = 0; n < this.count; n++) {
      const t = triangle[n], a = 3 * triangles[3 * t], b = 3 * triangles[3 * t + 1], c = 3 * triangles[3 * t + 2], q = 10 * t, s = f[q + 9];
      const v = bary[2 * n], w = bary[2 * n + 1], u = 1 - v - w, ox = s * o[3 * n], oy = s * o[3 * n + 1], oz = s * o[3 * n + 2], at = 12 * n;
      for (let d = 0; d < 3; d++) {
        const x = f[q + d], y = f[q + 3 + d], z = f[q + 6 + d];
        world[at + d] = u * p[a + d] + v * p[b + d] + w * p[c + d] + x * ox + y * oy + z * oz;
        for (let e = 0; e < 3; e++) { const l = 9 * n + 3 * e; world[at + 3 + 3 * e + d] = s * (x * local[l] + y * local[l + 1] + z * local[l + 2]); }
      }
    }
  }

  // Indices from far to near: depths in 65,536 steps, counted, then dealt out (a counting sort).
  sort(view) {
    const { world, depths, keys, buckets, order, count } = this, [x, y, z, w] = [view[8], view[9], view[10], view[11]];
    let near = Infinity, far = -Infinity;
    for (let n = 0; n < count; n++) {
      const d = x * world[12 * n] + y * world[12 * n + 1] + z * world[12 * n + 2] + w;
      depths[n] = d; if (d < near) near = d; if (d > far) far = d;
    }
    const step = 65535 / Math.max(far - near, 1e-9);
    buckets.fill(0);
    for (let n = 0; n < count; n++) { const k = (far - depths[n]) * step | 0; keys[n] = k; buckets[k + 1]++; }
    for (let k = 0; k < 65536; k++) buckets[k + 1] += buckets[k];
    for (let n = 0; n < count; n++) order[buckets[keys[n]]++] = n;
  }
}

function addScaled(sum, rows, start, w) { for (let i = 0; i < sum.length; i++) sum[i] += w * rows[start + i]; }
function plus(a, b) { return a.map((x, i) => x + b[i]); }
function times(m, v) { return [0, 3, 6].map(r => m[r] * v[0] + m[r + 1] * v[1] + m[r + 2] * v[2]); }
function product(a, b) { const m = []; for (let r = 0; r < 9; r += 3) for (let c = 0; c < 3; c++) m.push(a[r] * b[c] + a[r + 1] * b[c + 3] + a[r + 2] * b[c + 6]); return m; }

// Rodrigues' formula: the rotation matrix of an axis-angle vector.
function rotation([x, y, z]) {
  const t = Math.hypot(x, y, z), a = t < 1e-4 ? 1 - t * t / 6 : Math.sin(t) / t, b = t < 1e-4 ? .5 : (1 - Math.cos(t)) / (t * t);
  return [1 - b * (y * y + z * z), b * x * y - a * z, b * x * z + a * y,
          b * x * y + a * z, 1 - b * (x * x + z * z), b * y * z - a * x,
          b * x * z - a * y, b * y * z + a * x, 1 - b * (x * x + y * y)];
}

// Axes of each Gaussian in its triangle's frame, times their scales: columns of R(q) diag(exp(log scales)), one after the other.
function localAxes(quats, logScales) {
  const out = new Float32Array(logScales.length * 3);
  for (let n = 0; n < logScales.length / 3; n++) {
    let [w, x, y, z] = quats.subarray(4 * n, 4 * n + 4); const i = 1 / Math.hypot(w, x, y, z); w *= i; x *= i; y *= i; z *= i;
    const [a, b, c] = [0, 1, 2].map(d => Math.exp(logScales[3 * n + d]));
    out.set([a * (1 - 2 * (y * y + z * z)), 2 * a * (x * y + w * z), 2 * a * (x * z - w * y),
             2 * b * (x * y - w * z), b * (1 - 2 * (x * x + z * z)), 2 * b * (y * z + w * x),
             2 * c * (x * z + w * y), 2 * c * (y * z - w * x), c * (1 - 2 * (x * x + y * y))], 9 * n);
  }
  return out;
}
