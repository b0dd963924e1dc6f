// Pictures of cards and charts, as files: SVG, and PNG made of it. They are on white, whatever the page's colours.

const INK = { fill: "#1d1d1b", "font-family": "Helvetica, Arial, sans-serif" };
const words = (x, y, size, text, more = {}) =>
  svg("text", { x, y, "font-size": size, ...INK, ...more }, text.replace(/[\u0000-\u001f]/g, " "));

function sheet(wide, high, ...children) {
  const size = { width: wide, height: high, viewBox: `0 0 ${wide} ${high}`, xmlns: "http://www.w3.org/2000/svg" };
  return svg("svg", size, svg("rect", { width: wide, height: high, fill: "#fff" }), ...children);
}

const pixels = (canvas, place) =>
  svg("image", { href: canvas.toDataURL(), preserveAspectRatio: "none", "image-rendering": "pixelated", ...place });

// The map of the chosen layer, those of all layers, and the legend.
function cardPicture(card) {
  const tiles = [...card.layerTiles.values()].filter(({ tile, canvas }) => !tile.hidden && !canvas.hidden);
  const parts = tiles.map(({ canvas, title }) => [canvas, title.textContent]);
  if (card.flow && !card.flowTile.hidden) parts.push([card.flow, "rollout"]);
  const flat = card.grid[1] > 2 * card.grid[0];
  const [across, side, gap] = flat ? [3, 240, 14] : [6, 120, 14];
  const tall = (canvas, wide) => (wide * canvas.height) / canvas.width;
  const high = parts.length ? Math.round(tall(parts[0][0], side)) : 0;
  const wide = across * (side + gap) + gap;
  const top = card.big.hidden ? 56 : 72 + Math.round(tall(card.big, 2 * side));
  const nodes = [
    words(gap, 24, 15, card.name, { "font-weight": 600 }),
    words(gap, 43, 11, `${card.facts}; ${$("legend").title}`),
  ];
  if (!card.big.hidden) {
    nodes.push(words(gap, 66, 11, `${layerTitle(state.layer)}: ${card.readout.textContent.split(";")[0]}`));
    nodes.push(pixels(card.big, { x: gap, y: 72, width: 2 * side, height: tall(card.big, 2 * side) }));
  }
  parts.forEach(([canvas, title], k) => {
    const [x, y] = [gap + (k % across) * (side + gap), top + 8 + Math.floor(k / across) * (high + 26)];
    nodes.push(words(x, y + 12, 11, title), pixels(canvas, { x, y: y + 17, width: side, height: high }));
  });
  const bottom = top + 8 + Math.ceil(parts.length / across) * (high + 26);
  const besides = !card.big.hidden; // the legend stands beside the large map
  const [left, y] = besides ? [2 * side + 3 * gap, top - 42] : [gap, bottom + 8];
  const ends = [...$("legend").querySelectorAll("div span")].map((node) => node.textContent);
  nodes.push(pixels($("legend").querySelector("canvas"), { x: left, y, width: 2 * side, height: 9 }));
  ends.forEach((end, k) => {
    const share = k / (ends.length - 1);
    const anchor = ["start", "middle", "end"][2 * share];
    nodes.push(words(left + share * 2 * side, y + 23, 11, end, { "text-anchor": anchor }));
  });
  return sheet(wide, besides ? bottom : bottom + 42, ...nodes);
}

// A chart, its axis named, and a line for each model.
function chartPicture(label, root, series) {
  const [copy, wide, high] = [root.cloneNode(true), 1.5 * W, 1.5 * H];
  for (const node of copy.querySelectorAll("text")) fill(node, { ...INK, "font-size": 7.5 }, []);
  for (const node of copy.querySelectorAll(".axis")) fill(node, { stroke: "#dddddd", "stroke-width": 0.6 }, []);
  for (const node of copy.querySelectorAll(".line")) fill(node, { "stroke-width": 1.2 }, []);
  copy.querySelector(".cursor").remove();
  fill(copy, { x: 8, y: 36, width: wide, height: high }, []);
  const visible = series.filter(({ card }) => chosenCards().includes(card));
  const lines = visible.flatMap(({ card }, k) => {
    const y = high + 76 + 18 * k;
    const dashes = DASHES[card.index % DASHES.length];
    const line = { x1: 65, x2: 93, y1: y - 4, y2: y - 4, stroke: card.colour, "stroke-width": 2 };
    return [svg("line", { ...line, "stroke-dasharray": dashes }), words(101, y, 11, card.name)];
  });
  const axis = words(8 + 1.5 * (LEFT + (W - LEFT - RIGHT) / 2), high + 52, 11, "layer", { "text-anchor": "middle" });
  const title = words(8, 22, 14, label, { "font-weight": 600 });
  return sheet(wide + 16, high + 68 + 18 * visible.length, title, copy, axis, ...lines);
}

async function save(name, kind, picture) {
  const text = new XMLSerializer().serializeToString(picture);
  let file = new Blob([text], { type: "image/svg+xml" });
  if (kind === "png") {
    const image = new Image();
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
    await image.decode();
    const canvas = make("canvas", { width: 3 * image.width, height: 3 * image.height });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    file = await new Promise((done) => canvas.toBlob(done, "image/png"));
  }
  const address = URL.createObjectURL(file);
  const stem =
    name
      .replace(/[^\p{L}\p{N}.]+/gu, "_")
      .replace(/^[_.]+|_+$/g, "")
      .slice(0, 80) || "picture";
  make("a", { href: address, download: `${stem}.${kind}` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

function saveButtons(name, picture) {
  const buttons = ["png", "svg"].map((kind) => {
    const label = { "aria-label": `Save ${name} as ${kind.toUpperCase()}`, title: `Save as ${kind.toUpperCase()}` };
    return button(kind.toUpperCase(), label, () => save(name, kind, picture()));
  });
  return make("div", { class: "save" }, ...buttons);
}
