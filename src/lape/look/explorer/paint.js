// Maps as pixels.

const colourTable = (hexes, from) => {
  const stops = hexes.map((hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16)));
  const table = new Uint32Array(512);
  for (let k = 0; k < 512; k++) {
    const place = (from + (1 - from) * (k / 511)) * (stops.length - 1);
    const low = Math.min(Math.floor(place), stops.length - 2);
    const [r, g, b] = [0, 1, 2].map((c) =>
      Math.round(stops[low][c] + (place - low) * (stops[low + 1][c] - stops[low][c])),
    );
    table[k] = (255 << 24) | (b << 16) | (g << 8) | r;
  }
  return table;
};
const tables = {
  both: colourTable(data.colours.both, 0),
  red: colourTable(data.colours.both, 0.5),
  one: colourTable(data.colours.one, 0),
};
const shade = (value, [low, top, table]) =>
  tables[table][between(0, Math.round(((value - low) / (top - low || 1)) * 511), 511)];

const scratch = document.createElement("canvas");
function paint(canvas, map, scale, width, frame) {
  const cell = Math.max(1, Math.round(width / map.wide));
  const key = [map.key, scale, cell, frame, canvas.clientWidth].join();
  if (canvas.key === key) return;
  canvas.key = key;
  canvas.width = map.wide * cell;
  canvas.height = map.high * cell;
  if (state.all) canvas.height = canvas.width; // of some queries only, too
  scratch.width = map.wide;
  scratch.height = map.high;
  const small = scratch.getContext("2d");
  const image = small.createImageData(map.wide, map.high);
  const pixels = new Uint32Array(image.data.buffer);
  for (let j = 0; j < pixels.length; j++) pixels[j] = shade(map.values[j], scale);
  small.putImageData(image, 0, 0);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(scratch, 0, 0, canvas.width, canvas.height);
  const ratio = canvas.width / (canvas.clientWidth || width);
  if (frame) outline(context, frame, Math.max(1, Math.round(ratio * (canvas.clientWidth < 160 ? 1 : 2))));
}

// White around dark, on whole pixels.
function outline(context, [x, y, wide, high], thick) {
  context.lineWidth = thick;
  for (const [colour, out] of [
    ["#fff", thick / 2],
    ["#111", -thick / 2],
  ]) {
    context.strokeStyle = colour;
    context.strokeRect(x - out, y - out, wide + 2 * out, high + 2 * out);
  }
}

// Where the query is in a map, in the pixels of its canvas.
function frameOf(card, map, width) {
  const cell = Math.max(1, Math.round(width / map.wide));
  if (state.all) {
    const line = map.set.queries.indexOf(map.set.kept(queryOf(card, map.set)));
    const high = (map.wide * cell) / map.high;
    return [0, line * high, map.wide * cell, high];
  }
  const patch = map.at - map.set.prefix;
  return patch < 0 ? null : [(patch % map.wide) * cell, Math.floor(patch / map.wide) * cell, cell, cell];
}
