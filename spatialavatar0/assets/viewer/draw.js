// From Gaussians in the world to pixels, by WebGL2: one quad each, far to near, blended with premultiplied alpha.

const VERTEX = `#version 300 es
precision highp float; precision highp int; precision highp sampler2D; precision highp usampler2D;
uniform usampler2D order;           // which Gaussian is drawn first, second ...: far to near
uniform sampler2D world, paint;     // mean and three scaled axes; red green blue opacity
uniform mat4 view;                  // world -> camera: x right, y down, z forward
uniform vec4 lens;                  // fx fy cx cy, pixels
uniform vec2 size;                  // of the picture, pixels
flat out vec4 colour; flat out float reach; out vec2 v;

// A small step in camera space moves so far on the screen; the direction is clamped a bit outside the picture.
vec2 toScreen(vec3 axis, vec3 p) {
  vec2 margin = .15 * size / lens.xy, t = clamp(p.xy / p.z, -lens.zw / lens.xy - margin, (size - lens.zw) / lens.xy + margin);
  return lens.xy * (axis.xy - t * axis.z) / p.z;
}

void main() {
  int place = gl_VertexID / 4, i = int(texelFetch(order, ivec2(place % 512, place / 512), 0).r);
  ivec2 at = ivec2(3 * (i % 512), i / 512);
  vec4 a = texelFetch(world, at, 0), b = texelFetch(world, at + ivec2(1, 0), 0), c = texelFetch(world, at + ivec2(2, 0), 0);
  vec3 p = (view * vec4(a.xyz, 1)).xyz;
  colour = texelFetch(paint, ivec2(i % 512, i / 512), 0);
  reach = log(255. * colour.a);                       // where its alpha falls below 1/255
  gl_Position = vec4(0, 0, 2, 1); v = vec2(0);        // outside: nothing is drawn
  if (p.z < .01 || reach < 0.) return;
  mat3 turn = mat3(view);
  vec2 u0 = toScreen(turn * vec3(a.w, b.xy), p), u1 = toScreen(turn * vec3(b.zw, c.x), p), u2 = toScreen(turn * c.yzw, p);
  float xx = u0.x*u0.x + u1.x*u1.x + u2.x*u2.x, yy = u0.y*u0.y + u1.y*u1.y + u2.y*u2.y, xy = u0.x*u0.y + u1.x*u1.y + u2.x*u2.y;
  float m01 = u0.x*u1.y - u0.y*u1.x, m02 = u0.x*u2.y - u0.y*u2.x, m12 = u1.x*u2.y - u1.y*u2.x;
  float det = m01*m01 + m02*m02 + m12*m12 + EPS2D * (xx + yy + EPS2D);   // of the covariance, eps2d on its diagonal; exact for needles
  float l0 = sqrt(xx + EPS2D), l1 = xy / l0, l2 = sqrt(det) / l0;        // Cholesky: covariance = L L^T, L = (l0 0; l1 l2)
  vec2 corner = vec2(gl_VertexID & 1, gl_VertexID >> 1 & 1) * 2. - 1.;
  v = corner * sqrt(reach);
  vec2 pixel = lens.xy * p.xy / p.z + lens.zw + sqrt(2.) * vec2(l0 * v.x, l1 * v.x + l2 * v.y);
  gl_Position = vec4(2. * pixel.x / size.x - 1., 1. - 2. * pixel.y / size.y, 0, 1);
}`.replaceAll('EPS2D', '.3');

const FRAGMENT = `#version 300 es
precision highp float;
flat in vec4 colour; flat in float reach; in vec2 v;
out vec4 rgba;
void main() {
  float sigma = dot(v, v);
  if (sigma > reach) discard;
  float alpha = min(.999, colour.a * exp(-sigma));
  rgba = vec4(colour.rgb * alpha, alpha);
}`;

class Painter {
  constructor(canvas, avatar) {
    const gl = this.gl = canvas.getContext('webgl2', { antialias: false, premultipliedAlpha: true, preserveDrawingBuffer: true });
    if (!gl) throw new Error('This browser offers no WebGL2; please open the page in a newer one.');
    this.avatar = avatar; this.rows = avatar.world.length / 12 / 512;
    const program = this.program = link(gl); gl.useProgram(program);
    this.at = Object.fromEntries(['view', 'lens', 'size', 'world', 'paint', 'order'].map(n => [n, gl.getUniformLocation(program, n)]));
    ['world', 'order', 'paint'].forEach((name, unit) => gl.uniform1i(this.at[name], unit));
    texture(gl, 0, 3 * 512, this.rows, gl.RGBA32F, gl.RGBA, gl.FLOAT, avatar.world);
    texture(gl, 1, 512, this.rows, gl.R32UI, gl.RED_INTEGER, gl.UNSIGNED_INT, avatar.order);
    texture(gl, 2, 512, this.rows, gl.RGBA32F, gl.RGBA, gl.FLOAT, this.paint());
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, this.corners(), gl.STATIC_DRAW);
    gl.disable(gl.DEPTH_TEST); gl.enable(gl.BLEND); gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  }

  // Colours and opacities never change: red green blue opacity, padded to whole rows of the texture.
  paint() {
    const { rgb, opacities, count } = this.avatar, out = new Float32Array(4 * 512 * this.rows);
    for (let n = 0; n < count; n++) out.set([rgb[3 * n], rgb[3 * n + 1], rgb[3 * n + 2], opacities[n]], 4 * n);
    return out;
  }

  // Two triangles from four corners; corner k of the quad drawn n-th has number 4 n + k.
  corners() {
    const out = new Uint32Array(6 * this.avatar.count);
    for (let n = 0; n < this.avatar.count; n++) out.set([0, 1, 2, 2, 1, 3].map(k => 4 * n + k), 6 * n);
    return out;
  }

  upload() {
    const { gl, avatar } = this;
    gl.activeTexture(gl.TEXTURE0); gl.texSubImage2D(gl.TEXTURE_2D, 0, 0, 0, 3 * 512, this.rows, gl.RGBA, gl.FLOAT, avatar.world);
    gl.activeTexture(gl.TEXTURE1); gl.texSubImage2D(gl.TEXTURE_2D, 0, 0, 0, 512, this.rows, gl.RED_INTEGER, gl.UNSIGNED_INT, avatar.order);
  }

  draw(view, lens, background) {
    const { gl, at } = this, { width, height } = gl.canvas;
    gl.viewport(0, 0, width, height); gl.clearColor(...background, 1); gl.clear(gl.COLOR_BUFFER_BIT);
    gl.uniformMatrix4fv(at.view, true, view); gl.uniform4fv(at.lens, lens); gl.uniform2f(at.size, width, height);
    gl.drawElements(gl.TRIANGLES, 6 * this.avatar.count, gl.UNSIGNED_INT, 0);
  }

  // The picture, row by row from the top: red green blue alpha, 0..255.
  pixels() {
    const { gl } = this, { width, height } = gl.canvas, raw = new Uint8Array(4 * width * height), out = new Uint8Array(raw.length);
    gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, raw);
    for (let y = 0; y < height; y++) out.set(raw.subarray(4 * width * y, 4 * width * (y + 1)), 4 * width * (height - 1 - y));
    return out;
  }
}

function link(gl) {
  const program = gl.createProgram();
  for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
    const shader = gl.createShader(kind); gl.shaderSource(shader, source); gl.compileShader(shader); gl.attachShader(program, shader);
    if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS) && !gl.isContextLost()) throw new Error(gl.getShaderInfoLog(shader));
  }
  gl.linkProgram(program);
  if (!gl.getProgramParameter(program, gl.LINK_STATUS) && !gl.isContextLost()) throw new Error(gl.getProgramInfoLog(program));
  return program;
}

function texture(gl, unit, width, height, inside, format, type, values) {
  gl.activeTexture(gl.TEXTURE0 + unit); gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.texImage2D(gl.TEXTURE_2D, 0, inside, width, height, 0, format, type, values);
  for (const side of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, side, gl.NEAREST);
}
