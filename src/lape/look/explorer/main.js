// Draws everything, now and whenever the state changes.

function draw() {
  const began = performance.now();
  drawTheme();
  drawControls();
  drawPicker();
  drawCards();
  drawCharts();
  drawLegend();
  writeAddress();
  document.documentElement.dataset.drawn = (performance.now() - began).toFixed(1);
}

cards.forEach(makeCard);
let waiting = 0;
addEventListener("resize", () => {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(draw);
});
addEventListener("hashchange", () => {
  readAddress();
  change({});
});
readAddress();
change({});
window.lape = { state, cards, shown, patchOf };
document.documentElement.dataset.ready = "yes";
