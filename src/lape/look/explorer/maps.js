// From bytes to maps. A set of maps has, for each layer (and head; -1: the mean of all), a row for each query token;
// prefix tokens (class, registers) stand before the patches.

async function unpack(text) {
  const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

// The index of what is nearest to k.
const nearest = (list, k) => list.reduce((best, v, i) => (Math.abs(v - k) < Math.abs(list[best] - k) ? i : best), 0);

// Symmetric maps, of which the upper triangle is stored, row by row.
function triangle(buffer, layers) {
  const bytes = new Int8Array(buffer);
  const size = bytes.length / layers;
  const tokens = Math.round((Math.sqrt(8 * size + 1) - 1) / 2);
  const row = (layer, _head, i) => {
    const values = new Float32Array(tokens);
    for (let j = 0; j < tokens; j++) {
      const a = Math.min(i, j);
      values[j] = bytes[layer * size + a * tokens - (a * (a - 1)) / 2 + Math.max(i, j) - a] / 127;
    }
    return values;
  };
  return { row, tokens, queries: [...Array(tokens).keys()] };
}

// Maps by head, of which some queries were kept: the prefix tokens, and patches in some rows and columns of the grid.
function queryRows(packed, buffer, peaks, wide) {
  const bytes = peaks ? new Uint8Array(buffer) : new Int8Array(buffer);
  const [rows, columns] = packed.queries;
  const patches = rows.flatMap((r) => columns.map((c) => r * wide + c));
  const { prefix, tokens } = packed;
  const queries = [...Array(prefix).keys(), ...patches.map((patch) => prefix + patch)];
  const placeOf = (token) => {
    if (token < prefix) return token;
    const patch = token - prefix;
    return prefix + nearest(rows, Math.floor(patch / wide)) * columns.length + nearest(columns, patch % wide);
  };
  const row = (layer, head, token) => {
    const values = new Float32Array(tokens);
    const chosen = head < 0 ? [...Array(packed.heads).keys()] : [Math.min(head, packed.heads - 1)];
    for (const h of chosen) {
      const line = (layer * packed.heads + h) * queries.length + placeOf(token);
      const scale = (peaks ? peaks[line] / 255 : packed.limit / 127) / chosen.length;
      for (let j = 0; j < tokens; j++) values[j] += bytes[line * tokens + j] * scale;
    }
    return values;
  };
  return { row, tokens, queries, kept: (token) => queries[placeOf(token)] };
}

// A set of maps; of a video it is that of the first frame, and `each` has those of all frames that were kept.
async function readMaps(card, packed) {
  const frames = packed.frames || [0];
  const texts = packed.data.split(" ");
  const each = await Promise.all(frames.map((time, k) => readFrame(card, { ...packed, data: texts[k], time })));
  return { ...each[0], each };
}

async function readFrame(card, packed) {
  const patches = card.grid[0] * card.grid[1];
  const buffer = await unpack(packed.data);
  const peaks = packed.peaks ? new Float32Array(await unpack(packed.peaks)) : null;
  const read =
    packed.form === "triangle" ? triangle(buffer, packed.layers) : queryRows(packed, buffer, peaks, card.grid[1]);
  return { kept: (token) => token, ...packed, ...read, prefix: read.tokens - patches };
}

const cards = await Promise.all(
  data.models.map(async (card, index) => {
    const read = (list) => Promise.all(list.map((packed) => readMaps(card, packed)));
    const [maps, tokens, attention] = await Promise.all([card.maps, card.tokens, card.attention].map(read));
    const colour = data.series[index % data.series.length];
    return { ...card, index, colour, sets: { position: maps, tokens, attention } };
  }),
);
