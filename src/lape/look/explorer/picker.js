// The grid on which a patch is chosen, over a photograph where there is one.

const pictures = await Promise.all(
  data.images.map(async (photo) => {
    const image = new Image();
    image.src = photo.src;
    await image.decode().catch(() => null);
    return image;
  }),
);
const picker = $("picker");

function drawPicker() {
  const [high, wide] = lead.grid;
  const ratio = window.devicePixelRatio || 1;
  const cell = ((picker.clientWidth || 264) * ratio) / wide;
  picker.width = Math.round(cell * wide);
  picker.height = Math.round(cell * high);
  const context = picker.getContext("2d");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);
  const picture = pictures[state.photo];
  context.fillStyle = colour("--raised");
  context.fillRect(0, 0, picker.width, picker.height);
  if (picture) context.drawImage(picture, 0, 0, picker.width, picker.height);
  context.strokeStyle = picture ? "rgba(255,255,255,0.28)" : colour("--line");
  context.lineWidth = ratio;
  context.beginPath();
  const edge = (k, end) => between(0.5 * ratio, Math.round(k * cell), end - 0.5 * ratio);
  for (let k = 0; k <= wide; k++) {
    context.moveTo(edge(k, picker.width), 0);
    context.lineTo(edge(k, picker.width), picker.height);
  }
  for (let k = 0; k <= high; k++) {
    context.moveTo(0, edge(k, picker.height));
    context.lineTo(picker.width, edge(k, picker.height));
  }
  context.stroke();
  if (asksPrefix()) return;
  const place = [state.column * cell, state.row * cell, cell, cell];
  if (picture) outline(context, place.map(Math.round), Math.round(2 * ratio));
  else {
    context.fillStyle = colour("--ink");
    context.fillRect(...place);
  }
}

function patchAt(event, [high, wide]) {
  const box = event.currentTarget.getBoundingClientRect();
  const at = (k, size, count) => between(0, Math.floor((k / size) * count), count - 1);
  return [at(event.clientY - box.top, box.height, high), at(event.clientX - box.left, box.width, wide)];
}

function pick(row, column) {
  state.row = between(0, row, lead.grid[0] - 1);
  state.column = between(0, column, lead.grid[1] - 1);
  state.query = -1;
  draw();
}

// A patch of a card, taken as the one of the first card that lies there.
function pickOf(card, row, column) {
  pick(place(row, card.grid[0], lead.grid[0]), place(column, card.grid[1], lead.grid[1]));
}

const pickHere = (event) => pickOf(lead, ...patchAt(event, lead.grid));
picker.addEventListener("click", pickHere);
picker.addEventListener("pointermove", (event) => event.buttons && pickHere(event));
