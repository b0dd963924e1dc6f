
"use strict";
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  };

  // --- numbers ------------------------------------------------------------------------------------------------------

  async function unpack(text) {
    const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).arrayBuffer();
  }

  // A set of maps answers row(layer, head, patch): {values: one a patch, at: the patch that they belong to}.
  async function maps(card, packed, layers) {
    const [high, wide] = card.grid, n = high * wide;
    if (packed.form === "triangle") {
      const bytes = new Int8Array(await unpack(packed.data)), size = (n * (n + 1)) / 2;
      const row = (layer, _head, i) => {
        const values = new Float32Array(n), start = layer * size;
        for (let j = 0; j < n; j++) {
          const a = Math.min(i, j), b = Math.max(i, j);
          values[j] = bytes[start + a * n - (a * (a - 1)) / 2 + b - a] / 127;
        }
        return { values, at: i };
      };
      return { row, heads: 0 };
    }
    const buffer = await unpack(packed.data), signed = packed.limit > 0;
    const bytes = signed ? new Int8Array(buffer) : new Uint8Array(buffer);
    const peaks = signed ? null : new Float32Array(await unpack(packed.peaks));
    const [rows, columns] = packed.queries, queries = rows.length * columns.length;
    const nearest = (list, k) => list.reduce((best, v, i) => (Math.abs(v - k) < Math.abs(list[best] - k) ? i : best), 0);
    const row = (layer, head, i) => {
      const r = nearest(rows, Math.floor(i / wide)), c = nearest(columns, i % wide);
      const values = new Float32Array(n), query = r * columns.length + c;
      const chosen = head < 0 ? [...Array(packed.heads).keys()] : [head];
      for (const h of chosen) {
        const line = (layer * packed.heads + h) * queries + query;
        const scale = (signed ? packed.limit / 127 : peaks[line] / 255) / chosen.length;
        for (let j = 0; j < n; j++) values[j] += bytes[line * n + j] * scale;
      }
      return { values, at: rows[r] * wide + columns[c] };
    };
    return { row, heads: packed.heads };
  }

  const cards = await Promise.all(data.models.map(async (card, index) => ({
    ...card,
    colour: data.series[index % data.series.length],
    maps: await Promise.all(card.maps.map(async (m) => ({ ...m, ...(await maps(card, m)) }))),
    attention: await Promise.all(card.attention.map((m) => maps(card, m))),
  })));

  // --- state --------------------------------------------------------------------------------------------------------

  const lead = cards[0];
  const depth = Math.max(...cards.map((card) => card.layers));
  const lowest = Math.min(0, ...cards.flatMap((card) => card.maps.map((m) => m.first)));
  const positioned = cards.some((card) => card.maps.length);
  const centre = (card) => [Math.floor((card.grid[0] - 1) / 2), Math.floor((card.grid[1] - 1) / 2)];
  const state = {
    show: positioned ? "position" : "attention", view: 0, head: -1, layer: 0, hover: null, chart: null,
    photo: data.images.length ? 0 : -1, row: centre(lead)[0], column: centre(lead)[1],
  };
  const layerName = (layer) => (layer < 0 ? "table P" : String(layer));

  // The patch of a card that lies where the chosen patch of the first card lies.
  const patchOf = (card) => {
    const place = (k, mine, its) => Math.min(its - 1, Math.floor(((k + 0.5) * its) / mine));
    return place(state.row, lead.grid[0], card.grid[0]) * card.grid[1] + place(state.column, lead.grid[1], card.grid[1]);
  };

  // What a card shows in a layer: {values, at, limit, sign} or null.
  function shown(card, layer) {
    if (state.show === "attention") {
      const set = card.attention[Math.max(state.photo, 0)];
      if (!set || layer < 0 || layer >= card.layers) return null;
      const found = set.row(layer, Math.min(state.head, card.heads - 1), patchOf(card));
      return { ...found, limit: Math.max(...found.values), sign: 0 };
    }
    const set = card.maps[Math.min(state.view, card.maps.length - 1)];
    if (!set || layer < set.first || layer >= card.layers) return null;
    const found = set.row(layer - set.first, Math.min(state.head, card.heads - 1), patchOf(card));
    return { ...found, limit: set.limit, sign: 1 };
  }

  // --- colours ------------------------------------------------------------------------------------------------------

  const stops = data.colours.map((hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16)));
  const palette = new Uint32Array(512);
  for (let k = 0; k < 512; k++) {
    const place = (k / 511) * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2);
    const [r, g, b] = [0, 1, 2].map((c) => Math.round(stops[low][c] + (place - low) * (stops[low + 1][c] - stops[low][c])));
    palette[k] = (255 << 24) | (b << 16) | (g << 8) | r;
  }
  const shade = (share) => palette[Math.max(0, Math.min(511, Math.round((share + 1) * 255.5)))];

  const scratch = document.createElement("canvas");
  function paint(canvas, card, found, width, frame) {
    const [high, wide] = card.grid, cell = Math.max(1, Math.round(width / wide));
    if (canvas.width !== wide * cell || canvas.height !== high * cell) {
      canvas.width = wide * cell;
      canvas.height = high * cell;
    }
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (!found) return;
    scratch.width = wide;
    scratch.height = high;
    const small = scratch.getContext("2d"), image = small.createImageData(wide, high);
    const pixels = new Uint32Array(image.data.buffer), limit = found.limit || 1;
    for (let j = 0; j < pixels.length; j++) pixels[j] = shade(found.values[j] / limit);
    small.putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(scratch, 0, 0, canvas.width, canvas.height);
    if (frame) outline(context, found.at, wide, cell, canvas.width / (canvas.clientWidth || width));
  }

  function outline(context, patch, wide, cell, ratio) {
    const x = (patch % wide) * cell, y = Math.floor(patch / wide) * cell;
    for (const [colour, thick] of [["#fff", 3.2], ["#111", 1.5]]) {
      context.strokeStyle = colour;
      context.lineWidth = thick * ratio;
      context.strokeRect(x, y, cell, cell);
    }
  }

  // --- the picker ---------------------------------------------------------------------------------------------------

  const pictures = await Promise.all(data.images.map(async (photo) => {
    const image = new Image();
    image.src = photo.src;
    await image.decode().catch(() => null);
    return image;
  }));
  const picker = $("picker");
  function drawPicker() {
    const [high, wide] = lead.grid, ratio = window.devicePixelRatio || 1;
    const width = (picker.clientWidth || 288) * ratio, cell = width / wide;
    picker.width = Math.round(width);
    picker.height = Math.round(cell * high);
    const context = picker.getContext("2d"), style = getComputedStyle(document.documentElement);
    const picture = pictures[state.photo];
    if (picture) context.drawImage(picture, 0, 0, picker.width, picker.height);
    else {
      context.fillStyle = style.getPropertyValue("--raised");
      context.fillRect(0, 0, picker.width, picker.height);
    }
    context.strokeStyle = picture ? "rgba(255,255,255,0.28)" : style.getPropertyValue("--line");
    context.lineWidth = ratio;
    context.beginPath();
    const edge = (k) => Math.min(Math.max(Math.round(k * cell), 0.5 * ratio), picker.width - 0.5 * ratio);
    for (let k = 0; k <= wide; k++) { context.moveTo(edge(k), 0); context.lineTo(edge(k), picker.height); }
    for (let k = 0; k <= high; k++) {
      const y = Math.min(Math.max(Math.round(k * cell), 0.5 * ratio), picker.height - 0.5 * ratio);
      context.moveTo(0, y); context.lineTo(picker.width, y);
    }
    context.stroke();
    if (!picture) {
      context.fillStyle = style.getPropertyValue("--ink");
      context.fillRect(state.column * cell, state.row * cell, cell, cell);
    } else {
      const x = state.column * cell, y = state.row * cell;
      for (const [colour, thick] of [["#fff", 4.5], ["#111", 2]]) {
        context.strokeStyle = colour;
        context.lineWidth = thick * ratio;
        context.strokeRect(x, y, cell, cell);
      }
    }
  }

  function patchAt(event, grid) {
    const box = event.currentTarget.getBoundingClientRect();
    const at = (k, size, count) => Math.max(0, Math.min(count - 1, Math.floor((k / size) * count)));
    return [at(event.clientY - box.top, box.height, grid[0]), at(event.clientX - box.left, box.width, grid[1])];
  }

  function pick(row, column) {
    state.row = Math.max(0, Math.min(lead.grid[0] - 1, row));
    state.column = Math.max(0, Math.min(lead.grid[1] - 1, column));
    draw();
  }
  const pickIn = (card) => (event) => {
    const [row, column] = patchAt(event, card.grid);
    pick(Math.floor(((row + 0.5) * lead.grid[0]) / card.grid[0]), Math.floor(((column + 0.5) * lead.grid[1]) / card.grid[1]));
  };
  picker.addEventListener("click", pickIn(lead));
  picker.addEventListener("pointermove", (event) => { if (event.buttons) pickIn(lead)(event); });

  // --- the cards ----------------------------------------------------------------------------------------------------

  const number = (value, digits = 2) => (Math.abs(value) >= 0.001 || value === 0 ? value.toFixed(digits) : value.toExponential(1));
  for (const card of cards) {
    const swatch = make("span", { class: "swatch", "aria-hidden": "true" });
    swatch.style.background = card.colour;
    card.big = make("canvas", { class: "map", role: "img" });
    card.readout = make("p", { class: "readout" });
    card.tiles = make("div", { class: card.grid[1] > 2 * card.grid[0] ? "tiles wide" : "tiles", role: "group", "aria-label": `Layers of ${card.name}` });
    card.canvases = new Map();
    for (let layer = lowest; layer < card.layers; layer++) {
      const canvas = make("canvas", { "aria-hidden": "true" });
      const tile = make("button", { type: "button", class: "tile" }, make("span", {}, layer < 0 ? "table P" : `layer ${layer}`), canvas);
      tile.addEventListener("click", () => { state.layer = layer; draw(); });
      card.canvases.set(layer, { canvas, tile });
      card.tiles.append(tile);
    }
    if (card.rollout) {
      card.flow = make("canvas", { role: "img", "aria-label": "Attention rollout through all layers" });
      card.flowTile = make("div", { class: "tile" }, make("span", {}, "rollout"), card.flow);
      card.tiles.append(card.flowTile);
    }
    const about = make("p", {}, `join ${card.join}, position ${card.pe}, ${card.layers} layers, ${card.grid[0]} × ${card.grid[1]} patches`);
    about.title = card.about;
    const main = make("div", { class: "big" }, card.big, card.readout);
    $("cards").append(make("article", { class: card.grid[1] > 2 * card.grid[0] ? "card flat" : "card" },
      make("header", {}, make("h2", {}, swatch, make("span", {}, card.name)), about),
      make("div", { class: "body" }, main, card.tiles)));
    card.big.addEventListener("click", pickIn(card));
    card.big.addEventListener("pointermove", (event) => { state.hover = { card, at: patchAt(event, card.grid) }; read(card); });
    card.big.addEventListener("pointerleave", () => { state.hover = null; read(card); });
  }

  function read(card) {
    const found = shown(card, state.layer), wide = card.grid[1];
    card.readout.replaceChildren();
    if (!found) {
      const why = state.show === "attention" ? "a table has no attention" : "no single table: each layer has its own";
      card.readout.append(state.layer < 0 ? why : `no layer ${state.layer}: this model has ${card.layers}`);
      return;
    }
    const at = (patch) => `(${Math.floor(patch / wide)}, ${patch % wide})`;
    const hover = state.hover && state.hover.card === card ? state.hover.at[0] * wide + state.hover.at[1] : -1;
    if (hover >= 0) card.readout.append(`patch ${at(found.at)} and ${at(hover)}: `, make("b", {}, number(found.values[hover], state.show === "attention" ? 3 : 2)));
    else {
      const rest = found.at === patchOf(card) ? "" : ", the nearest that was kept";
      card.readout.append(`patch ${at(found.at)} with all${rest}; point at one for its value`);
    }
  }

  function drawCards() {
    const ratio = window.devicePixelRatio || 1;
    for (const card of cards) {
      const found = shown(card, state.layer);
      paint(card.big, card, found, (card.big.clientWidth || 360) * ratio, true);
      card.big.setAttribute("aria-label", `${card.name}, ${state.layer < 0 ? "table P" : `layer ${state.layer}`}: ${state.show} of patch row ${state.row}, column ${state.column}`);
      for (const [layer, { canvas, tile }] of card.canvases) {
        paint(canvas, card, shown(card, layer), (canvas.clientWidth || 90) * ratio, true);
        tile.setAttribute("aria-pressed", String(layer === state.layer));
        tile.hidden = layer < 0 && state.show === "attention";
      }
      if (card.flow) {
        const values = card.rollout[Math.max(state.photo, 0)];
        card.flowTile.hidden = state.show !== "attention";
        paint(card.flow, card, { values, limit: 1 }, (card.flow.clientWidth || 90) * ratio, false);
      }
      read(card);
    }
  }

  // --- measures over depth ------------------------------------------------------------------------------------------

  const svg = (tag, attributes = {}, text = "") => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.textContent = text;
    return node;
  };
  const W = 300, H = 132, LEFT = 38, RIGHT = 6, TOP = 8, BOTTOM = 20;
  const x = (layer) => LEFT + (depth > 1 ? (layer / (depth - 1)) * (W - LEFT - RIGHT) : (W - LEFT - RIGHT) / 2);
  function ticks(low, high) {
    const raw = (high - low) / 3, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= raw);
    const found = [];
    for (let v = Math.floor(low / step) * step; v < high + step * 0.999; v += step) found.push(v);
    return found;
  }

  const charts = [];
  for (const label of new Set(cards.flatMap((card) => card.measures.map((m) => m.label)))) {
    const series = cards.map((card) => ({ card, m: card.measures.find((m) => m.label === label) })).filter((s) => s.m);
    const all = series.flatMap((s) => [...s.m.values, ...(s.m.dots || []).flat()]).filter((v) => v !== null);
    if (!all.length) continue;
    let low = Math.min(...all), high = Math.max(...all);
    if (high - low < 1e-6 * Math.max(1, Math.abs(high))) { low -= 0.5; high += 0.5; }
    const marks = ticks(low, high);
    low = marks[0]; high = marks[marks.length - 1];
    const y = (v) => TOP + (1 - (v - low) / (high - low)) * (H - TOP - BOTTOM);
    const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${label} over depth` });
    const places = Math.max(0, Math.min(6, -Math.floor(Math.log10((marks[1] - marks[0]) * 1.0001))));
    for (const v of marks) {
      root.append(svg("line", { class: "axis", x1: LEFT, x2: W - RIGHT, y1: y(v), y2: y(v) }));
      root.append(svg("text", { x: LEFT - 6, y: y(v) + 4, "text-anchor": "end" }, v.toFixed(places)));
    }
    const every = Math.ceil(depth / 8);
    for (let layer = 0; layer < depth; layer += every) root.append(svg("text", { x: x(layer), y: H - 4, "text-anchor": "middle" }, String(layer)));
    const cursor = svg("line", { class: "cursor", y1: TOP, y2: H - BOTTOM });
    root.append(cursor);
    for (const { card, m } of series) {
      (m.dots || []).forEach((heads, layer) => heads.forEach((v) => {
        if (v !== null) root.append(svg("circle", { cx: x(layer), cy: y(v), r: 1.7, fill: card.colour, "fill-opacity": 0.4 }));
      }));
      let path = "", pen = "M";
      m.values.forEach((v, layer) => {
        if (v === null) { pen = "M"; return; }
        path += `${pen}${x(layer).toFixed(1)},${y(v).toFixed(1)}`;
        pen = "L";
        if (depth < 15 || m.values.length === 1) root.append(svg("circle", { cx: x(layer), cy: y(v), r: 2.4, fill: card.colour }));
      });
      root.append(svg("path", { class: "line", d: path, stroke: card.colour }));
    }
    const now = make("div", { class: "now" });
    const chart = { cursor, now, series };
    const layerAt = (event) => {
      const box = root.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * W;
      return Math.max(0, Math.min(depth - 1, Math.round(((at - LEFT) / (W - LEFT - RIGHT)) * (depth - 1))));
    };
    root.addEventListener("pointermove", (event) => { state.chart = layerAt(event); drawCharts(); });
    root.addEventListener("pointerleave", () => { state.chart = null; drawCharts(); });
    root.addEventListener("click", (event) => { state.layer = layerAt(event); draw(); });
    $("charts").append(make("article", { class: "chart" }, make("h3", {}, label), make("p", {}, series[0].m.hint), now, root));
    charts.push(chart);
  }

  function drawCharts() {
    const layer = state.chart ?? Math.max(state.layer, 0);
    for (const { cursor, now, series } of charts) {
      cursor.setAttribute("x1", x(layer));
      cursor.setAttribute("x2", x(layer));
      now.replaceChildren(`layer ${layer}`);
      for (const { card, m } of series) {
        const v = m.values[layer], value = make("i", { title: card.name }, v === null || v === undefined ? "none" : number(v, 3));
        value.style.color = card.colour;
        now.append(value);
      }
    }
  }

  // --- controls -----------------------------------------------------------------------------------------------------

  const options = (select, pairs) => select.replaceChildren(...pairs.map(([value, text]) => make("option", { value }, text)));
  const modes = [...(positioned ? [["position", "Position"]] : []), ...(data.images.length ? [["attention", "Attention"]] : [])];
  for (const [mode, text] of modes) {
    const button = make("button", { type: "button", "data-show": mode }, text);
    button.addEventListener("click", () => { state.show = mode; if (mode === "attention") { state.layer = Math.max(0, state.layer); if (state.photo < 0) state.photo = 0; } draw(); });
    $("show").append(button);
  }
  $("show").hidden = modes.length < 2;
  const views = cards.map((card) => card.maps).reduce((a, b) => (b.length > a.length ? b : a), []);
  options($("view"), views.map((m, k) => [k, m.label]));
  $("view").addEventListener("change", (event) => { state.view = Number(event.target.value); draw(); });
  const heads = Math.max(...cards.map((card) => card.heads));
  options($("head"), [[-1, "mean of all"], ...Array.from({ length: heads }, (_, k) => [k, String(k)])]);
  $("head").addEventListener("change", (event) => { state.head = Number(event.target.value); draw(); });
  $("layer").min = lowest;
  $("layer").max = depth - 1;
  $("layer").addEventListener("input", (event) => { state.layer = Number(event.target.value); draw(); });
  if (data.images.length) {
    [-1, ...data.images.keys()].forEach((k) => {
      const button = make("button", { type: "button", "data-photo": k, "aria-label": k < 0 ? "Grid only" : data.images[k].name, title: k < 0 ? "Grid only" : data.images[k].name });
      if (k < 0) button.append("grid");
      else { const image = make("img", { alt: "" }); image.src = data.images[k].src; button.append(image); }
      button.addEventListener("click", () => { state.photo = k; if (k < 0 && positioned) state.show = "position"; draw(); });
      $("photos").append(button);
    });
  }
  for (const [text, place] of [["corner", () => [0, 0]], ["edge", () => [0, centre(lead)[1]]], ["centre", () => centre(lead)]]) {
    const button = make("button", { type: "button" }, text);
    button.addEventListener("click", () => pick(...place()));
    $("spots").append(button);
  }

  function drawControls() {
    const headed = state.show === "attention" || cards.some((card) => card.maps.some((m) => m.kind === "bias"));
    $("head-row").hidden = !headed;
    $("view-row").hidden = state.show !== "position" || views.length < 2;
    $("head").value = state.head;
    $("layer").min = state.show === "attention" ? 0 : lowest;
    $("layer").value = state.layer;
    $("layer").setAttribute("aria-valuetext", layerName(state.layer));
    $("layer-name").textContent = layerName(state.layer);
    $("where").textContent = `row ${state.row}, column ${state.column}`;
    picker.setAttribute("aria-label", `Patch picker, ${lead.grid[0]} by ${lead.grid[1]}: row ${state.row}, column ${state.column}. Arrow keys move the patch.`);
    for (const button of document.querySelectorAll("[data-show]")) button.setAttribute("aria-pressed", String(button.dataset.show === state.show));
    for (const button of document.querySelectorAll("[data-photo]")) button.setAttribute("aria-pressed", String(Number(button.dataset.photo) === state.photo));
  }

  function drawLegend() {
    const bar = make("canvas"), sign = state.show === "attention" ? 0 : 1;
    bar.width = 256;
    bar.height = 1;
    const context = bar.getContext("2d"), image = context.createImageData(256, 1), pixels = new Uint32Array(image.data.buffer);
    for (let k = 0; k < 256; k++) pixels[k] = shade(sign ? k / 127.5 - 1 : k / 255);
    context.putImageData(image, 0, 0);
    const kinds = new Set(cards.flatMap((card) => card.maps.map((m) => m.kind)));
    const limit = Math.max(0, ...cards.flatMap((card) => card.maps.filter((m) => m.kind === "bias").map((m) => m.limit)));
    let text = "cosine similarity of positions", ends = ["−1", "0", "1"];
    if (!sign) { text = "attention to each patch"; ends = ["0", "the strongest in each map"]; }
    else if (!kinds.has("cosine")) { text = "bias on attention logits"; ends = [`−${number(limit)}`, "0", number(limit)]; }
    else if (kinds.has("bias")) text = `cosine similarity; bias: ±${number(limit)}`;
    if (sign && cards.filter((card) => card.maps.some((m) => m.kind === "bias")).length > 1) { text = "bias on attention logits, of each model's largest"; ends = ["−", "0", "+"]; }
    $("legend").replaceChildren(make("p", {}, text), bar, make("div", {}, ...ends.map((end) => make("span", {}, end))));
    $("legend").setAttribute("aria-label", `Colours: ${text}, ${ends.join(" to ")}`);
  }

  const dark = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const nameTheme = () => { $("theme").textContent = dark() ? "Light" : "Dark"; };
  $("theme").addEventListener("click", () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; nameTheme(); drawPicker(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { nameTheme(); drawPicker(); });

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    const turn = { "[": -1, "]": 1 }[event.key];
    if (move && !/^(INPUT|SELECT)$/.test(event.target.tagName)) {
      event.preventDefault();
      pick(state.row + move[0], state.column + move[1]);
    } else if (turn) {
      state.layer = Math.max(Number($("layer").min), Math.min(depth - 1, state.layer + turn));
      draw();
    } else return;
    $("said").textContent = `row ${state.row}, column ${state.column}, layer ${layerName(state.layer)}`;
  });

  function draw() {
    const began = performance.now();
    drawControls();
    drawPicker();
    drawCards();
    drawCharts();
    drawLegend();
    document.documentElement.dataset.drawn = (performance.now() - began).toFixed(1);
  }
  let waiting = 0;
  addEventListener("resize", () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(draw); });
  nameTheme();
  draw();
  window.lape = { state, cards, shown, patchOf };
  document.documentElement.dataset.ready = "yes";
})();
