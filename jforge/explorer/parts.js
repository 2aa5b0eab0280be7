"use strict";
/* What the panels share: makers of elements, tables and bars, and fields that hold a whole number. */
const parts = (() => {
const MOVED = ["stored", "written", "read"];
const $ = (id) => document.getElementById(id);

function make(tag, options = {}, ...inside) {
  const svg = ["svg", "path", "rect", "line", "text", "circle", "title"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(options)) node.setAttribute(name, value);
  node.append(...inside);
  return node;
}
function options(select, names, chosen) {
  select.replaceChildren(...names.map((name, i) => make("option", { value: i }, name)));
  select.selectedIndex = chosen;
}

/* Numbers of bytes are numbers or BigInts. */
const whole = (n) => n.toLocaleString("en-US");
const decimal = (x) => numbers.format(x, ",.1f");
const sum = (list) => list.reduce((a, b) => a + b, typeof list[0] === "bigint" ? 0n : 0);
const isAre = (n, one, many) => `${whole(n)} ${n === 1 ? one : many}`;

/* The number in a field, or null and one line in the element `line`. */
function count(field, name, most, line) {
  const n = Number(field.value), good = Number.isInteger(n) && n >= 1 && n <= most;
  line.textContent = good ? "" : `${name} is "${field.value}"; it must be a whole number from 1 to ${most}.`;
  return good ? n : null;
}

function meters(bytes, buffers, scale) {
  return MOVED.flatMap((what) => {
    const bar = make("span", { class: `bar ${what}`, "aria-hidden": "true" });
    bytes[what].forEach((n, i) => {
      if (!n) return;
      const part = make("i", { style: `width:${(100 * n) / scale}%` });
      part.title = `${buffers[i].name}: ${size(n)}`;
      bar.append(part);
    });
    return [make("span", {}, what), bar, make("b", { "data-sum": what }, size(sum(bytes[what])))];
  });
}

/* groups: [{title, buffers, bytes}], one without a title where there is nothing to tell apart. The last row has all sums. */
function table(groups, caption) {
  const head = ["buffer", "axes", ...MOVED].map((t) => make("th", { scope: "col", class: t }, t));
  const line = (name, axes, counts, kind) => make("tr", { class: kind }, make("th", { scope: "row" }, name),
    make("td", { class: "axes" }, axes), ...counts.map((n) => make("td", { "data-bytes": n }, `${whole(n)} B`)));
  const title = (text) => make("tr", { class: "kind" }, make("th", { colspan: 2 + MOVED.length, scope: "rowgroup" },
    make("span", {}, text)));
  const bodies = groups.map(({ title: text, buffers, bytes }) => make("tbody", {}, ...(text ? [title(text)] : []),
    ...buffers.map((b, i) => line(b.name, `${b.axes}, ${b.dtype}`, MOVED.map((what) => bytes[what][i]), ""))));
  const all = MOVED.map((what) => sum(groups.flatMap(({ bytes }) => bytes[what])));
  bodies.at(-1).append(line("all", "", all, "sum"));
  const made = make("table", { "aria-label": caption }, make("thead", {}, make("tr", {}, ...head)), ...bodies);
  return make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": caption }, made);
}
return { $, MOVED, make, options, whole, decimal, sum, isAre, count, meters, table };
})();
