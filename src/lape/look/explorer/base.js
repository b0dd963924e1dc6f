// What all files of the script use. They are put one after the other into one module.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const make = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

function button(text, attributes, act) {
  const node = make("button", { type: "button", ...attributes }, text);
  node.addEventListener("click", act);
  return node;
}

const between = (low, value, high) => Math.max(low, Math.min(high, value));

function number(value, digits = 2) {
  const size = Math.abs(value);
  if (size === 0 || size >= (digits < 3 ? 0.001 : 0.1)) return value.toFixed(digits).replace("-", "\u2212");
  const text = size < 1e-4 ? value.toExponential(1) : value.toPrecision(3);
  return text.replace("-", "\u2212");
}
