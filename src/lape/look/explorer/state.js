// What the page shows: all of it is in `state`, and what differs from the start is in the address.

const lead = cards[0];
const depth = Math.max(...cards.map((card) => card.layers));
const centre = (card) => card.grid.map((side) => Math.floor((side - 1) / 2));
const prefixNames = cards.map((card) => card.prefix).reduce((a, b) => (b.length > a.length ? b : a), []);
const SHOWS = { position: "Position", tokens: "Tokens", attention: "Attention" };
const shows = Object.keys(SHOWS).filter((show) => cards.some((card) => card.sets[show].length));
const views = cards.map((card) => card.sets.position).reduce((a, b) => (b.length > a.length ? b : a), []);
const heads = Math.max(0, ...cards.map((card) => card.heads));
const frames = Math.max(...cards.map((card) => card.frames));
const lowest = Math.min(
  0,
  ...cards.flatMap((card) =>
    Object.values(card.sets)
      .flat()
      .map((set) => set.first),
  ),
);

const start = {
  show: shows[0],
  layer: 0,
  row: centre(lead)[0],
  column: centre(lead)[1],
  frame: Math.floor((frames - 1) / 2), // of the longest video
  query: -1, // a prefix token, or -1: the patch at row, column
  all: 0, // 1: all tokens with all
  view: 0,
  head: -1,
  photo: data.images.length ? 0 : -1,
  range: "fixed",
  models: cards.map((card) => card.index).join("."),
  theme: "", // "": as the system has it
};
const state = { ...start };

// What each entry may be: a list of words, or the least and the largest number.
const allowed = {
  show: shows,
  layer: [lowest, depth - 1],
  row: [0, lead.grid[0] - 1],
  column: [0, lead.grid[1] - 1],
  frame: [0, frames - 1],
  query: [-1, prefixNames.length - 1],
  all: [0, 1],
  view: [0, Math.max(0, views.length - 1)],
  head: [-1, heads - 1],
  photo: [-1, data.images.length - 1],
  range: ["fixed", "all", "each"],
  theme: ["", "light", "dark"],
};

function understood(name, text) {
  if (name === "models") {
    const chosen = text.split(".");
    return chosen.every((k) => /^\d+$/.test(k) && cards[k]) ? text : start.models;
  }
  if (typeof start[name] === "string") return allowed[name].includes(text) ? text : start[name];
  const value = Number(text);
  return text !== "" && Number.isInteger(value) && value >= allowed[name][0] && value <= allowed[name][1]
    ? value
    : start[name];
}

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of Object.keys(start))
    state[name] = given.has(name) ? understood(name, given.get(name)) : start[name];
}

let writing = 0;
function writeAddress() {
  clearTimeout(writing); // browsers slow down pages that write it often
  writing = setTimeout(() => {
    const changed = Object.keys(start).filter((name) => state[name] !== start[name]);
    const address = `#${new URLSearchParams(changed.map((name) => [name, state[name]]))}`;
    if (address !== (location.hash || "#")) history.replaceState(null, "", address);
  }, 120);
}

const chosenCards = () => state.models.split(".").map((k) => cards[k]);
const firstName = () => (state.show === "tokens" ? "input" : "table P");
const layerName = (layer) => (layer < 0 ? firstName() : String(layer));
const layerTitle = (layer) => (layer < 0 ? firstName() : `layer ${layer}`);
// What lies of `its` places where the k-th of `mine` lies.
const place = (k, mine, its) => Math.min(its - 1, Math.floor(((k + 0.5) * its) / mine));
const frameIn = (card) => place(state.frame, frames, card.frames);
const setOf = (card) => {
  const sets = card.sets[state.show];
  const set = sets[state.show === "position" ? Math.min(state.view, sets.length - 1) : Math.max(state.photo, 0)];
  return set?.each[nearest(set.frames || [0], frameIn(card))];
};

// The frame that a card shows, in words; none of an image.
function frameName(card) {
  const time = setOf(card)?.time;
  if (card.frames < 2 || time === undefined) return "";
  return `frame ${time}${time === frameIn(card) ? "" : ", the nearest that was kept"}: `;
}

// The patch of a card that lies where the chosen patch of the first card lies.
function patchOf(card) {
  return place(state.row, lead.grid[0], card.grid[0]) * card.grid[1] + place(state.column, lead.grid[1], card.grid[1]);
}

const asksPrefix = () => state.query >= 0 && state.show !== "position";
const queryOf = (card, set) => (asksPrefix() ? state.query : set.prefix + patchOf(card));

// The name of a token of a card, as a person would point at it.
function tokenName(card, set, token) {
  const wide = card.grid[1];
  const patch = token - set.prefix;
  return patch < 0 ? `${card.prefix[token]} token` : `patch (${Math.floor(patch / wide)}, ${patch % wide})`;
}

// What a card shows in a layer: values of all tokens, or of all tokens with all; null where there is nothing.
let context = "";
const remembered = new Map();
function shown(card, layer) {
  const set = setOf(card);
  const query = set && queryOf(card, set);
  if (!set || layer < set.first || layer >= set.first + set.layers || (asksPrefix() && query >= set.prefix))
    return null;
  const now = [state.show, state.view, state.head, state.photo, state.frame, state.all].join();
  if (now !== context) {
    context = now;
    remembered.clear();
  }
  const key = [card.index, layer, state.all ? "" : set.kept(query)].join();
  if (!remembered.has(key)) {
    if (remembered.size > 2000) remembered.clear();
    remembered.set(key, {
      ...(state.all ? wholeMap : oneRow)(card, set, layer - set.first, query),
      key: `${now},${key}`,
    });
  }
  return remembered.get(key);
}

function oneRow(card, set, layer, query) {
  const at = set.kept(query);
  const tokens = set.row(layer, state.head, at);
  const values = tokens.subarray(set.prefix);
  return {
    set,
    at,
    values,
    extra: tokens.subarray(0, set.prefix),
    wide: card.grid[1],
    high: card.grid[0],
    ...ends(values, (j) => j === at - set.prefix),
  };
}

function wholeMap(card, set, layer) {
  const values = new Float32Array(set.queries.length * set.tokens);
  set.queries.forEach((query, line) => values.set(set.row(layer, state.head, query), line * set.tokens));
  const itself = (j) => set.queries[Math.floor(j / set.tokens)] === j % set.tokens;
  return { set, values, wide: set.tokens, high: set.queries.length, ...ends(values, itself) };
}

// The least and the largest value; that of a token with itself says nothing, unless it is attention.
function ends(values, itself) {
  let [low, top] = [Infinity, -Infinity];
  for (let j = 0; j < values.length; j++) {
    if (state.show !== "attention" && values.length > 1 && itself(j)) continue;
    low = Math.min(low, values[j]);
    top = Math.max(top, values[j]);
  }
  return { low, top };
}

// The values between which colours run, and which colours: two-sided around 0, or one-sided.
function scaleOf(map, all) {
  const attention = state.show === "attention";
  if (state.range === "fixed") return attention ? [0, map.top, "red"] : [-map.set.limit, map.set.limit, "both"];
  const maps = state.range === "each" ? [map] : all;
  return [Math.min(...maps.map((m) => m.low)), Math.max(...maps.map((m) => m.top)), "one"];
}
