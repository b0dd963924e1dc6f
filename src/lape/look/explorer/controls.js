// Buttons, selects, keys and the theme.

const options = (select, pairs) =>
  select.replaceChildren(...pairs.map(([value, text]) => make("option", { value }, text)));
const pressed = (node, on) => node.setAttribute("aria-pressed", String(Boolean(on)));

function change(values) {
  Object.assign(state, values);
  if (state.show === "attention") state.layer = Math.max(0, state.layer);
  if (state.show !== "position" && state.photo < 0) state.photo = 0;
  draw();
}

const choices = []; // buttons that are pressed in some states: [button, whether it is]
function choice(where, text, attributes, act, on) {
  const node = button(text, attributes, act);
  $(where).append(node);
  choices.push([node, on]);
}

for (const show of shows)
  choice(
    "show",
    SHOWS[show],
    { "data-show": show },
    () => change({ show }),
    () => state.show === show,
  );
$("show").hidden = shows.length < 2;
choice(
  "whole",
  "One with all",
  { "data-all": 0 },
  () => change({ all: 0 }),
  () => !state.all,
);
choice(
  "whole",
  "All with all",
  { "data-all": 1 },
  () => change({ all: 1 }),
  () => state.all,
);
for (const card of cards) {
  const toggle = () => {
    const chosen = chosenCards();
    const kept = chosen.includes(card) ? chosen.filter((other) => other !== card) : [...chosen, card];
    if (kept.length)
      change({
        models: kept
          .map((c) => c.index)
          .sort((a, b) => a - b)
          .join("."),
      });
  };
  choice("models", sample(card), {}, toggle, () => chosenCards().includes(card));
  $("models").lastChild.append(card.name);
}
$("models").hidden = cards.length < 2;
prefixNames.forEach((name, query) =>
  choice(
    "prefix",
    name,
    { "data-query": query },
    () => change({ query }),
    () => state.query === query,
  ),
);
for (const [text, place] of [
  ["corner", [0, 0]],
  ["edge", [0, centre(lead)[1]]],
  ["centre", centre(lead)],
])
  $("spots").append(button(text, {}, () => pick(...place)));
if (data.images.length)
  for (const photo of [-1, ...data.images.keys()]) {
    const name = photo < 0 ? "Grid only" : data.images[photo].name;
    const content = photo < 0 ? "grid" : make("img", { alt: "", src: data.images[photo].src });
    const show = photo < 0 && shows.includes("position") ? { show: "position" } : {};
    const attributes = { "data-photo": photo, "aria-label": name, title: name };
    choice(
      "photos",
      content,
      attributes,
      () => change({ photo, ...show }),
      () => state.photo === photo,
    );
  }

options(
  $("view"),
  views.map((set, k) => [k, set.label]),
);
options($("head"), [[-1, "mean of all"], ...Array.from({ length: heads }, (_, k) => [k, String(k)])]);
for (const name of ["view", "head"])
  $(name).addEventListener("change", () => change({ [name]: Number($(name).value) }));
$("range").addEventListener("change", () => change({ range: $("range").value }));
$("layer").max = depth - 1;
$("layer").addEventListener("input", () => change({ layer: Number($("layer").value) }));

$("frame").max = frames - 1;
$("frame").addEventListener("input", () => change({ frame: Number($("frame").value) }));

const OF_VIDEO = " Of a video, the patches of one frame with each other; the measures below count all frames.";
const MEANING = {
  position:
    "How alike the positions of patches are. Better: rings or a cross around the patch, and layers that differ. " +
    "Worse: one colour everywhere (the layer cannot tell patches apart), or stripes (it knows one axis only).",
  tokens:
    "How alike the tokens are that leave a layer. Better: what belongs together is alike, an object and its parts. " +
    "Worse: all alike in late layers (features have collapsed), or alike by place alone.",
  attention:
    "Where a query reads. Better: heads that differ, near in early layers, on objects in late ones. " +
    "Worse: the same map for every query, or a few patches that take all.",
};

function drawControls() {
  const attention = state.show === "attention";
  const first = attention ? 0 : Math.min(0, ...cards.flatMap((card) => card.sets[state.show].map((set) => set.first)));
  const biased = state.show === "position" && views.some((set) => set.kind === "bias");
  $("head-row").hidden = !heads || !(attention || biased);
  $("view-row").hidden = state.show !== "position" || views.length < 2;
  $("prefix-row").hidden = state.show === "position" || !prefixNames.length;
  $("range").options[0].textContent = attention ? "0 to the strongest" : biased ? "± the largest" : "\u22121 to 1";
  $("range").value = state.range;
  $("view").value = state.view;
  $("head").value = state.head;
  $("layer").min = first;
  $("layer").value = state.layer;
  $("layer").setAttribute("aria-valuetext", layerName(state.layer));
  $("layer-name").textContent = layerName(state.layer);
  $("where").textContent = asksPrefix()
    ? `${prefixNames[state.query]} token`
    : `row ${state.row}, column ${state.column}`;
  const timed = frames > 1 && state.show === "position";
  $("frame-row").hidden = !timed;
  $("frame").value = state.frame;
  $("frame-name").textContent = state.frame;
  $("meaning").textContent = MEANING[state.show] + (timed ? OF_VIDEO : "");
  const grid = `${lead.grid[0]} by ${lead.grid[1]}`;
  picker.setAttribute("aria-label", `Patch picker, ${grid}: ${$("where").textContent}. Arrow keys move the patch.`);
  for (const [node, on] of choices) pressed(node, on());
}

// The legend: what colours mean, and the values at their ends.
function legend() {
  const sets = chosenCards().map(setOf).filter(Boolean);
  const limits = sets.map((set) => set.limit);
  const biased = sets.filter((set) => set.kind === "bias").length;
  let text = `cosine similarity of ${state.show === "tokens" ? "tokens" : "positions"}`;
  if (state.show === "attention") text = "attention to each patch";
  else if (biased) text = biased < sets.length ? "cosine similarity, or bias on attention" : "bias on attention logits";
  const whole = limits.every((limit) => limit === limits[0]); // one scale for all
  const maps = drawnMaps();
  const [low, top, table] = maps.length ? scaleOf(maps[0], maps) : [0, 1, "one"];
  const digits = state.show === "attention" ? 3 : 2;
  if (state.range === "all") return [text, table, [number(low, digits), number(top, digits)]];
  if (state.range === "each") return [text, table, ["lowest", "highest in each map"]];
  if (table === "red") return [text, table, ["0", "the strongest in each map"]];
  if (!whole) return [`${text}, of each model's largest`, table, ["\u2212", "0", "+"]];
  return [text, table, [number(low, biased ? 2 : 0), "0", number(top, biased ? 2 : 0)]];
}

function drawLegend() {
  const [text, table, ends] = legend();
  const bar = make("canvas", { width: 256, height: 1 });
  const context = bar.getContext("2d");
  const image = context.createImageData(256, 1);
  const colours = new Uint32Array(image.data.buffer);
  for (let k = 0; k < 256; k++) colours[k] = shade(k, [0, 255, table]);
  context.putImageData(image, 0, 0);
  $("legend").replaceChildren(make("p", {}, text), bar, make("div", {}, ...ends.map((end) => make("span", {}, end))));
  $("legend").title = text;
  $("legend").setAttribute("aria-label", `Colours: ${text}, ${ends.join(" to ")}`);
}

const THEME = "lape-theme"; // in the browser's memory, where it has one for this page
const system = matchMedia("(prefers-color-scheme: dark)");
function storedTheme(write) {
  try {
    if (write) localStorage.setItem(THEME, write);
    return localStorage.getItem(THEME);
  } catch {
    return null;
  }
}
const dark = () => (document.documentElement.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
function drawTheme() {
  const theme = state.theme || storedTheme() || "";
  if (allowed.theme.includes(theme)) document.documentElement.dataset.theme = theme;
  $("theme").textContent = dark() ? "Light" : "Dark";
}
$("theme").addEventListener("click", () => {
  const theme = dark() ? "light" : "dark";
  storedTheme(theme);
  change({ theme });
});
system.addEventListener("change", () => draw());

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  const turn = { "[": -1, "]": 1 }[event.key];
  if (move && !/^(INPUT|SELECT)$/.test(event.target.tagName)) {
    event.preventDefault();
    pick(state.row + move[0], state.column + move[1]);
  } else if (turn) change({ layer: between(Number($("layer").min), state.layer + turn, depth - 1) });
  else return;
  $("said").textContent = `row ${state.row}, column ${state.column}, layer ${layerName(state.layer)}`;
});
