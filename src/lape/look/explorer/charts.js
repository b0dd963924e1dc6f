// Measures over depth, a chart each.

const [W, H, LEFT, RIGHT, TOP, BOTTOM] = [300, 132, 38, 6, 8, 20];
const charts = [];
let chartLayer = null; // under the pointer
const xOf = (layer) => LEFT + (depth > 1 ? layer / (depth - 1) : 0.5) * (W - LEFT - RIGHT);

function ticks(low, high) {
  const raw = (high - low) / 3;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= raw);
  const marks = [];
  for (let v = Math.floor(low / step) * step; v < high + step * 0.999; v += step) marks.push(v);
  return marks;
}

function makeChart(label) {
  const series = cards
    .map((card) => ({ card, m: card.measures.find((m) => m.label === label) }))
    .filter((entry) => entry.m);
  const all = series.flatMap(({ m }) => [...m.values, ...(m.dots || []).flat()]).filter((v) => v !== null);
  if (!all.length) return;
  let [low, high] = [Math.min(...all), Math.max(...all)];
  const least = 0.02 * Math.max(0.5, Math.abs(low), Math.abs(high)); // what differs by less is drawn as level
  if (high - low < least) [low, high] = [(low + high - least) / 2, (low + high + least) / 2];
  const marks = ticks(low, high);
  [low, high] = [marks[0], marks.at(-1)];
  const y = (v) => TOP + (1 - (v - low) / (high - low)) * (H - TOP - BOTTOM);
  const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${label} over depth` });
  const places = between(0, -Math.floor(Math.log10((marks[1] - marks[0]) * 1.0001)), 6);
  for (const v of marks) {
    root.append(svg("line", { class: "axis", x1: LEFT, x2: W - RIGHT, y1: y(v), y2: y(v) }));
    root.append(
      svg("text", { x: LEFT - 6, y: y(v) + 4, "text-anchor": "end" }, v.toFixed(places).replace("-", "\u2212")),
    );
  }
  for (let layer = 0; layer < depth; layer += Math.ceil(depth / 8))
    root.append(svg("text", { x: xOf(layer), y: H - 4, "text-anchor": "middle" }, String(layer)));
  const cursor = svg("line", { class: "cursor", y1: TOP, y2: H - BOTTOM });
  root.append(cursor);
  for (const entry of series) root.append((entry.node = curve(entry, y)));
  const now = make("div", { class: "now" });
  const layerAt = (event) => {
    const box = root.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * W;
    return between(0, Math.round(((at - LEFT) / (W - LEFT - RIGHT)) * (depth - 1)), depth - 1);
  };
  const point = (layer) => {
    chartLayer = layer;
    drawCharts();
  };
  root.addEventListener("pointermove", (event) => point(layerAt(event)));
  root.addEventListener("pointerleave", () => point(null));
  root.addEventListener("click", (event) => change({ layer: layerAt(event) }));
  const { hint, means } = series[0].m;
  const head = make(
    "header",
    {},
    make("h3", {}, label),
    saveButtons(label, () => chartPicture(label, root, series)),
  );
  $("charts").append(make("article", { class: "chart" }, head, make("p", {}, `${hint}. ${means}`), now, root));
  charts.push({ cursor, now, series });
}

function curve({ card, m }, y) {
  const node = svg("g");
  const dot = (layer, v, r, opacity) =>
    v !== null &&
    node.append(svg("circle", { cx: xOf(layer), cy: y(v), r, fill: card.colour, "fill-opacity": opacity }));
  (m.dots || []).forEach((values, layer) => values.forEach((v) => dot(layer, v, 1.7, 0.4)));
  let [path, pen] = ["", "M"];
  m.values.forEach((v, layer) => {
    if (v !== null) path += `${pen}${xOf(layer).toFixed(1)},${y(v).toFixed(1)}`;
    pen = v === null ? "M" : "L";
    if (depth < 15) dot(layer, v, 2.4, 1);
  });
  const dashes = DASHES[card.index % DASHES.length];
  node.append(svg("path", { class: "line", d: path, stroke: card.colour, "stroke-dasharray": dashes, fill: "none" }));
  return node;
}

function drawCharts() {
  const layer = chartLayer ?? Math.max(state.layer, 0);
  const visible = chosenCards();
  for (const { cursor, now, series } of charts) {
    cursor.setAttribute("x1", xOf(layer));
    cursor.setAttribute("x2", xOf(layer));
    now.replaceChildren(`layer ${layer}`);
    for (const { card, m, node } of series) {
      const here = visible.includes(card);
      node.style.display = here ? "" : "none";
      const v = m.values[layer] ?? null;
      if (here) now.append(make("i", { title: card.name }, sample(card), v === null ? "none" : number(v, 3)));
    }
  }
}

for (const label of new Set(cards.flatMap((card) => card.measures.map((m) => m.label)))) makeChart(label);
