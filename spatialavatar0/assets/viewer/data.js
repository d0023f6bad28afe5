// Bytes to arrays. The page carries one string of base64; HEADER.arrays says what lies where in it.

function openArrays(header, text) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer;
  const types = { float32: Float32Array, uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, int16: Int16Array };
  const arrays = {};
  for (const [name, a] of Object.entries(header.arrays)) {
    const raw = new types[a.type](bytes, a.at, a.length);
    arrays[name] = a.step ? unquantise(raw, a.low, a.step) : raw;
  }
  return arrays;
}

// Columns stored in whole steps: value = low + step * whole number, each column with its own low and step.
function unquantise(raw, low, step) {
  const out = new Float32Array(raw.length), columns = step.length;
  for (let i = 0; i < raw.length; i++) out[i] = low[i % columns] + step[i % columns] * raw[i];
  return out;
}
