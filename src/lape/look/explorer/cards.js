// A card a model: the map of the chosen layer, large, and those of all layers.

// Models are told apart by colour and by dashes.
const DASHES = ["", "6 3", "2 2.5", "9 3 2 3", "12 4", "4 2 1 2"];
function sample(card) {
  const style = { stroke: card.colour, "stroke-dasharray": DASHES[card.index % DASHES.length], class: "line" };
  const line = svg("line", { x1: 1, x2: 27, y1: 5, y2: 5, ...style });
  return svg("svg", { class: "sample", viewBox: "0 0 28 10", "aria-hidden": "true" }, line);
}

const pixelsOf = (canvas, otherwise) => (canvas.clientWidth || otherwise) * (window.devicePixelRatio || 1);
let hover = null; // {card, at: [row, column] of its map}

function makeCard(card) {
  card.big = make("canvas", { class: "map", role: "img" });
  card.readout = make("p", { class: "readout" });
  card.nothing = make("p", { class: "nothing" });
  const flat = card.grid[1] > 2 * card.grid[0];
  card.tiles = make("div", {
    class: flat ? "tiles wide" : "tiles",
    role: "group",
    "aria-label": `Layers of ${card.name}`,
  });
  card.layerTiles = new Map();
  for (let layer = lowest; layer < card.layers; layer++) {
    const [title, canvas] = [make("span"), make("canvas", { "aria-hidden": "true" })];
    const tile = button(title, { class: "tile" }, () => change({ layer }));
    tile.append(canvas);
    card.layerTiles.set(layer, { canvas, tile, title });
    card.tiles.append(tile);
  }
  if (card.rollout) {
    card.flow = make("canvas", { role: "img", "aria-label": `Attention rollout through all layers of ${card.name}` });
    card.flowTile = make("div", { class: "tile" }, make("span", {}, "rollout"), card.flow);
    card.tiles.append(card.flowTile);
  }
  const facts = make("p", { title: card.about }, card.facts);
  const title = make("h2", {}, sample(card), make("span", {}, card.name));
  const main = make("div", { class: "big" }, card.big, card.nothing, card.readout);
  card.node = make(
    "article",
    { class: flat ? "card flat" : "card", "aria-label": card.name },
    make(
      "header",
      {},
      title,
      saveButtons(card.name, () => cardPicture(card)),
    ),
    facts,
    make("div", { class: "body" }, main, card.tiles),
  );
  $("cards").append(card.node);
  const mapGrid = () => {
    const map = shown(card, state.layer);
    return map ? [map.high, map.wide] : [1, 1];
  };
  card.big.addEventListener("click", (event) => {
    const [row, column] = patchAt(event, mapGrid());
    if (state.all) pickToken(card, setOf(card).queries[row]);
    else pickOf(card, row, column);
  });
  card.big.addEventListener("pointermove", (event) => {
    hover = { card, at: patchAt(event, mapGrid()) };
    read(card);
  });
  card.big.addEventListener("pointerleave", () => {
    hover = null;
    read(card);
  });
}

function pickToken(card, token) {
  const { prefix } = setOf(card);
  if (token < prefix) change({ query: token });
  else pickOf(card, Math.floor((token - prefix) / card.grid[1]), (token - prefix) % card.grid[1]);
}

function whyNothing(card) {
  const set = setOf(card);
  if (!set) return card.notes[state.show] || "without a photograph there is nothing to show";
  if (asksPrefix() && state.query >= set.prefix) return `this model has no ${prefixNames[state.query]} token`;
  if (state.layer >= card.layers) return `no layer ${state.layer}: this model has ${card.layers}`;
  return state.show === "attention" ? "a table has no attention" : "no single table: each layer has its own";
}

// What stands below the large map: the value under the pointer, or what the map is.
function read(card) {
  const map = shown(card, state.layer);
  card.nothing.textContent = map ? "" : whyNothing(card);
  card.readout.replaceChildren();
  if (!map) return;
  const { set } = map;
  card.readout.append(frameName(card));
  const digits = state.show === "attention" ? 3 : 2;
  const query = set.kept(queryOf(card, set));
  const name = (token) => tokenName(card, set, token);
  if (hover?.card === card) {
    const [row, column] = hover.at;
    const [from, to] = state.all ? [set.queries[row], column] : [query, set.prefix + row * map.wide + column];
    card.readout.append(
      `${name(from)} and ${name(to)}: `,
      make("b", {}, number(map.values[row * map.wide + column], digits)),
    );
    return;
  }
  if (state.all) return card.readout.append("all tokens with all; point at one for its value");
  const rest = query === queryOf(card, set) ? "" : ", the nearest that was kept";
  const extra = [...map.extra].map((value, k) => `, ${card.prefix[k]}: ${number(value, digits)}`).slice(0, 3);
  card.readout.append(`${name(query)} with all${rest}${extra.join("")}; point at a patch for its value`);
}

const drawnMaps = () =>
  chosenCards().flatMap((card) => [...card.layerTiles.keys()].map((layer) => shown(card, layer)).filter(Boolean));

function drawCards() {
  const visible = chosenCards();
  const all = drawnMaps();
  $("cards").style.setProperty("--models", visible.length);
  $("cards").dataset.models = visible.length;
  for (const card of cards) {
    card.node.hidden = !visible.includes(card);
    if (card.node.hidden) continue;
    const put = (canvas, map, otherwise) => {
      canvas.hidden = !map;
      if (!map) return;
      const width = pixelsOf(canvas, otherwise);
      paint(canvas, map, scaleOf(map, all), width, canvas !== card.big && state.all ? null : frameOf(card, map, width));
    };
    const of = asksPrefix() ? `${prefixNames[state.query]} token` : `patch row ${state.row}, column ${state.column}`;
    const what = frameName(card) + (state.all ? "all tokens with all" : of);
    card.big.setAttribute("aria-label", `${card.name}, ${layerTitle(state.layer)}: ${SHOWS[state.show]} of ${what}`);
    for (const [layer, { canvas, tile, title }] of card.layerTiles) {
      tile.hidden = layer < 0 && state.show === "attention";
      title.textContent = layerTitle(layer);
      tile.setAttribute("aria-pressed", String(layer === state.layer));
      if (!tile.hidden) put(canvas, shown(card, layer), 90);
    }
    put(card.big, shown(card, state.layer), 360);
    if (card.flow) drawFlow(card);
    read(card);
  }
}

function drawFlow(card) {
  card.flowTile.hidden = state.show !== "attention" || Boolean(state.all);
  if (card.flowTile.hidden) return;
  const values = card.rollout[Math.max(state.photo, 0)];
  const scale = state.range === "fixed" ? [0, 1, "red"] : [Math.min(...values), 1, "one"];
  const map = { values, wide: card.grid[1], high: card.grid[0], key: state.photo };
  paint(card.flow, map, scale, pixelsOf(card.flow, 90), null);
}
