// The page: state, sliders, mouse and touch, motions, and `window.avatar` for whoever wants to drive it from outside.

const $ = id => document.getElementById(id);
const TURNS = { neckPitch: [1, 0], neckYaw: [1, 1], neckRoll: [1, 2], jawPitch: [2, 0], jawYaw: [2, 1], eyesPitch: [3, 0], eyesYaw: [3, 1] }; // joint, axis
const VIEW = { yaw: 0, pitch: 0, zoom: 1 };
const values = {}, sliders = {};                // name -> number: weights 0..1, turns and view in degrees
let head, painter, fixed = null, background = [1, 1, 1], stale = { pose: true, draw: true }, motion = null, started = 0, before = {};
window.avatarStats = {};

// ---- one frame -----------------------------------------------------------------------------------------------------------------------
function pose() {
  const turns = [0, 1, 2, 3, 4].map(() => [0, 0, 0]);
  for (const [name, [joint, axis]] of Object.entries(TURNS)) turns[joint][axis] = values[name] * Math.PI / 180;
  turns[4] = turns[3].slice();                  // the eyes turn together
  head.pose(head.names.map(n => values[n]), turns, [0, 0, 0]);
}

function frame(seen = true) {
  const t = [performance.now()], lap = () => t.push(performance.now()), camera = fixed || orbit();
  if (stale.pose) pose(); lap();
  if (stale.pose) { head.frame(); head.bind(); } lap();
  head.sort(camera.view); lap();
  if (seen) painter.upload(); lap();
  if (seen) painter.draw(camera.view, camera.lens, background); lap();
  const [skin, bind, sort, upload, draw] = t.slice(1).map((x, i) => x - t[i]);
  window.avatarStats = { skin, bind, sort, upload, draw, work: skin + bind + sort, count: head.count };
  stale = { pose: false, draw: false };
}

function tick(now) {
  requestAnimationFrame(tick);
  if (motion) play(Math.max(0, now - started) / 1000);   // a frame's time may lie just before the click
  if (!fixed) fit();
  if ((stale.pose || stale.draw) && !painter.gl.isContextLost()) frame();
}

// ---- camera --------------------------------------------------------------------------------------------------------------------------
function orbit() {
  const { target, distance, focal } = HEADER.home, { width, height } = $('view'), [a, b] = [values.yaw, values.pitch].map(x => x * Math.PI / 180);
  const back = [Math.sin(a) * Math.cos(b), Math.sin(b), Math.cos(a) * Math.cos(b)], x = [Math.cos(a), 0, -Math.sin(a)], z = back.map(v => -v);
  const y = [z[1] * x[2] - z[2] * x[1], z[2] * x[0] - z[0] * x[2], z[0] * x[1] - z[1] * x[0]];
  const eye = target.map((v, i) => v + distance / values.zoom * back[i]), f = focal * Math.min(width, height);
  const rows = [x, y, z].map(r => [...r, -r.reduce((s, v, i) => s + v * eye[i], 0)]);
  return { view: new Float32Array([...rows.flat(), 0, 0, 0, 1]), lens: [f, f, width / 2, height / 2] };
}

function fit() {                                // one drawn pixel per screen pixel, at most two per CSS pixel
  const canvas = $('view'), ratio = Math.min(window.devicePixelRatio, 2), w = Math.round(canvas.clientWidth * ratio), h = Math.round(canvas.clientHeight * ratio);
  if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; stale.draw = true; }
}

// ---- state ---------------------------------------------------------------------------------------------------------------------------
function set(changes) {
  for (const [name, value] of Object.entries(changes)) {
    if (name === 'background') { setBackground(value); continue; }
    if (!(name in values)) throw new Error(`no control ${name}; see Object.keys(avatar.values)`);
    if (!Number.isFinite(+value)) throw new Error(`${name} should be a number; got ${value}`);
    values[name] = +value;
    stale[name in VIEW ? 'draw' : 'pose'] = true;
    if (sliders[name]) show(name);
  }
}

function setBackground(hex) {
  if (!/^#[0-9a-f]{6}$/i.test(hex)) throw new Error(`background should look like #ffffff; got ${hex}`);
  background = [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16) / 255); $('background').value = hex; stale.draw = true;
}

function reset() { stop(); set(rest()); }
function rest() { return { ...Object.fromEntries(Object.keys(values).map(n => [n, 0])), ...VIEW }; }

// ---- motions -------------------------------------------------------------------------------------------------------------------------
function baked({ fps, names, frames }) {        // a table of weights, played in a loop, from row to row
  return t => {
    const i = Math.floor(t * fps), f = t * fps - i, row = frames[i % frames.length], next = frames[(i + 1) % frames.length];
    return Object.fromEntries(names.map((n, k) => [n, row[k] + f * (next[k] - row[k])]));
  };
}

function play(seconds) {
  const now = Object.entries(motion.at(seconds)).filter(([name]) => name in values);
  set(Object.fromEntries(now));
}

function start(name) {
  stop();
  if (!(name in HEADER.motions)) throw new Error(`no motion ${name}`);
  motion = { name, at: baked(HEADER.motions[name]) };
  before = { ...values }; started = performance.now(); mark();
}

function stop() {                               // what the motion moved goes back to where it was; the view stays
  if (motion) set(Object.fromEntries(Object.keys(motion.at(0)).filter(n => n in values).map(n => [n, before[n]])));
  motion = null; mark();
}

function mark() { for (const b of $('motions').children) { const on = !!motion && b.textContent === motion.name; b.classList.toggle('on', on); b.setAttribute('aria-pressed', on); } }

// ---- controls ------------------------------------------------------------------------------------------------------------------------
function show(name) { const { input, output } = sliders[name], v = values[name]; input.value = v; output.textContent = v.toFixed(input.max > 2 ? 0 : 2); }

function twin(name) {                           // the other side; jawLeft and mouthLeft have none, they are directions
  const other = name.replace(/Left$|Right$/, s => s === 'Left' ? 'Right' : 'Left');
  return other !== name && other in values && !/^(jaw|mouth)(Left|Right)$/.test(name) ? other : null;
}

function addSlider(name, low, high, parent) {
  const row = document.createElement('label'), text = document.createElement('span'), input = document.createElement('input'), output = document.createElement('output');
  row.className = 'slider' + (twin(name) ? /Right$/.test(name) ? ' right' : ' left' : '');
  text.textContent = name.replace(/([A-Z])/g, ' $1').toLowerCase(); Object.assign(input, { type: 'range', min: low, max: high, step: (high - low) / 200, name });
  input.addEventListener('input', () => { const v = +input.value, other = $('linked').checked && twin(name); set({ [name]: v, ...(other && { [other]: v }) }); });
  row.append(text, input, output); parent.append(row); sliders[name] = { input, output }; show(name);
}

function addGroups() {
  for (const [title, rows] of Object.entries(HEADER.groups)) {
    const box = document.createElement('details'), summary = document.createElement('summary');
    summary.textContent = title; box.append(summary); box.open = title === 'Pose';
    for (const [name, low, high] of rows) addSlider(name, low, high, box);
    $('groups').append(box);
  }
  for (const name of Object.keys(HEADER.motions)) {
    const b = document.createElement('button'); b.textContent = name; $('motions').append(b, ' ');
    b.addEventListener('click', () => motion && motion.name === name ? stop() : start(name));
  }
  $('linked').addEventListener('change', () => $('groups').classList.toggle('linked', $('linked').checked));
  $('groups').classList.add('linked');
  $('background').addEventListener('input', e => set({ background: e.target.value }));
  $('reset').addEventListener('click', reset);
  $('fold').addEventListener('click', () => $('panel').classList.toggle('folded'));
}

function turn(dx, dy) { set({ yaw: (values.yaw - dx + 540) % 360 - 180, pitch: Math.max(-80, Math.min(80, values.pitch + dy)) }); }
function zoom(factor) { set({ zoom: Math.max(.3, Math.min(6, values.zoom * factor)) }); }

function addPointers(canvas) {                  // one finger or the mouse turns, two fingers or the wheel zoom
  const down = new Map(), spread = () => { const [a, b] = [...down.values()]; return Math.hypot(a.x - b.x, a.y - b.y); };
  canvas.addEventListener('pointerdown', e => { canvas.setPointerCapture(e.pointerId); down.set(e.pointerId, { x: e.clientX, y: e.clientY }); });
  for (const end of ['pointerup', 'pointercancel']) canvas.addEventListener(end, e => down.delete(e.pointerId));
  canvas.addEventListener('pointermove', e => {
    const last = down.get(e.pointerId); if (!last) return;
    const was = down.size === 2 && spread(); down.set(e.pointerId, { x: e.clientX, y: e.clientY });
    if (down.size === 2) zoom(spread() / Math.max(was, 1)); else turn((e.clientX - last.x) * .4, (e.clientY - last.y) * .4);
  });
  canvas.addEventListener('wheel', e => { e.preventDefault(); zoom(Math.exp(-e.deltaY * .001)); }, { passive: false });
  const keys = { ArrowLeft: () => turn(-5, 0), ArrowRight: () => turn(5, 0), ArrowUp: () => turn(0, 5), ArrowDown: () => turn(0, -5), '+': () => zoom(1.1), '-': () => zoom(1 / 1.1) };
  canvas.addEventListener('keydown', e => { if (keys[e.key]) { e.preventDefault(); keys[e.key](); } });
}

// ---- from outside --------------------------------------------------------------------------------------------------------------------
window.avatar = {
  values, set, reset, play: start, stop,
  camera(view, K, width, height) {              // rows of a 4x4 world -> camera and of a 3x3; without arguments: back to orbiting
    fixed = view ? { view: new Float32Array(view.flat()), lens: [K[0][0], K[1][1], K[0][2], K[1][2]] } : null;
    if (view && width) Object.assign($('view'), { width, height });
    stale.draw = true;
  },
  draw() { frame(); return window.avatarStats; },
  pixels() { frame(); return painter.pixels(); },
  measure(n = 60) {                             // milliseconds of each part of the page's own work over n poses: middle values, and the least. Parts one by one:
    const laps = [], was = { ...values };       // a turn that another program takes on the processor falls into one part of a frame and spoils only that
    const pick = at => { const [skin, bind, sort] = ['skin', 'bind', 'sort'].map(k => laps.map(l => l[k]).sort((a, b) => a - b)[at]); return { skin, bind, sort, work: skin + bind + sort }; };
    for (let i = 0; i < n; i++) {
      set({ jawPitch: 10 * Math.abs(Math.sin(i)), neckYaw: 20 * Math.sin(i / 5), [head.names[i % head.names.length]]: .5, yaw: 40 * Math.sin(i / 7) });
      frame(false); laps.push(window.avatarStats);
    }
    set(was);
    return { ...pick(n >> 1), least: pick(0) };
  },
};

function complain(error) { $('message').textContent = error.message; $('message').hidden = false; console.error(error); }

try {
  head = new Avatar(HEADER, openArrays(HEADER, BYTES));
  for (const n of [...head.names, ...Object.keys(TURNS)]) values[n] = 0;
  Object.assign(values, VIEW);
  painter = new Painter($('view'), head);
  $('view').addEventListener('webglcontextlost', e => e.preventDefault());
  $('view').addEventListener('webglcontextrestored', () => { painter = new Painter($('view'), head); stale.pose = true; });
  addGroups(); addPointers($('view')); setBackground(HEADER.background);
  $('status').textContent = `${head.count.toLocaleString('en')} Gaussians. Drag to turn, wheel or pinch to zoom.`;
  if (innerWidth < 700) $('panel').classList.add('folded');
  requestAnimationFrame(tick);
} catch (error) { complain(error); }
