/* The panels of mechanisms and shipped models: they draw what Python computed (the JSON in #data).
   State is in the address after #, so a view can be kept. */
(() => {
const DATA = JSON.parse(document.getElementById("data").textContent);
const BY_NAME = Object.fromEntries(DATA.mechanisms.map((m) => [m.name, m]));
const STYLE = { ".": "empty", "-": "kept" };
const LAST = DATA.steps - 1;
const { $, MOVED, make, options, whole, decimal, sum, isAre, count, meters, table } = parts;
const kind = (letter) => "kind-" + (STYLE[letter] || letter);

/* State: a and b are {name, setting, model} (numbers of the last two), the rest is shared. */
const first = (name) => (BY_NAME[name] ? name : DATA.mechanisms[0].name);
const state = { a: { name: first("gqa"), setting: 0, model: 0 }, b: { name: first("csa"), setting: 0, model: 0 },
  step: Math.min(43, LAST), context: DATA.contexts.indexOf(131072), batch: 1, dtype: DATA.dtypes[0] };
const SIDES = ["a", "b"];

function fromAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const count = (key, below, usual) => {
    const n = Number(given.get(key));
    return given.has(key) && Number.isInteger(n) && n >= 0 && n < below ? n : usual;
  };
  for (const side of SIDES) {
    const me = state[side];
    if (BY_NAME[given.get(side)]) me.name = given.get(side);
    me.setting = count(side + "-sizes", BY_NAME[me.name].settings.length, 0);
    me.model = count(side + "-model", BY_NAME[me.name].models.length, 0);
  }
  state.step = count("token", DATA.steps, state.step);
  state.context = Math.max(0, DATA.contexts.indexOf(Number(given.get("context") || DATA.contexts[state.context])));
  state.batch = Math.max(1, count("rows", 4097, state.batch));
  if (DATA.dtypes.includes(given.get("dtype"))) state.dtype = given.get("dtype");
}

function toAddress() {
  const said = new URLSearchParams();
  for (const side of SIDES) {
    said.set(side, state[side].name);
    said.set(side + "-sizes", state[side].setting);
    said.set(side + "-model", state[side].model);
  }
  said.set("token", state.step);
  said.set("context", DATA.contexts[state.context]);
  said.set("rows", state.batch);
  said.set("dtype", state.dtype);
  try { history.replaceState(null, "", "#" + said); } catch { /* a frame that may not: the view is not kept */ }
}

/* The token whose step wrote each slot last, up to a step; null where none did. A state is written by every step. */
function writers(group, step) {
  const held = Array(group.slots).fill(null);
  for (let t = 0; t <= step; t++) {
    const now = group.steps[t];
    for (let i = 0; i < group.slots; i++) if ("wxes".includes(now[i])) held[i] = t;
  }
  return held;
}
const places = (row, letter) => [...row].flatMap((c, i) => (c === letter ? [i] : []));
const isState = (group) => group.kept.startsWith("a state");

/* What a step does to the buffers of a group, in words, and which tokens they lose. */
function told(group, step) {
  const row = group.steps[step], before = step ? writers(group, step - 1) : Array(group.slots).fill(null);
  const at = (letter) => places(row, letter);
  const read = at("r").length, skipped = at("-").length, noun = group.kept.startsWith("an entry") ? "entr" : "slot";
  const nouns = (n) => noun === "slot" ? isAre(n, "slot", "slots") : isAre(n, "entry", "entries");
  const lost = at("x").map((i) => before[i]), parts = [];
  const left = step ? at("d").filter((i) => group.steps[step - 1][i] !== "d") : [];
  lost.push(...left.map((i) => before[i]));
  if (isState(group)) return { lost: [], text: { s: "changes it", r: "reads it", "-": "leaves it as it is", ".": "empty" }[row] };
  if (at("w").length) parts.push(`writes slot ${at("w").join(", ")}`);
  if (at("x").length) parts.push(`writes slot ${at("x").join(", ")} over token ${at("x").map((i) => before[i]).join(", ")}`);
  if (at("e").length) parts.push(`completes entry ${at("e").join(", ")}`);
  if (read + skipped) parts.push(skipped ? `reads ${read} of ${nouns(read + skipped)} from before, skips ${skipped}`
    : `reads ${read === 1 ? "the one" : "all " + read} from before`);
  else if (!parts.length) parts.push("nothing in it yet");
  if (at("d").length) parts.push(`${nouns(at("d").length)} left over`);
  return { lost: lost.filter((t) => t !== null).sort((x, y) => x - y), text: parts.join("; ") };
}
const tokens = (list) => list.length === 1 ? `token ${list[0]}` : list.length > 2 && list.at(-1) - list[0] === list.length - 1
  ? `tokens ${list[0]} to ${list.at(-1)}` : `tokens ${list.join(", ")}`;

/* One decode step of one side. */
function drawStep(side) {
  const { name, setting } = state[side], one = BY_NAME[name].settings[setting], step = state.step;
  const bytes = Object.fromEntries(MOVED.map((what) => [what, one.cost[what][step]]));
  const loses = one.groups.flatMap((g) => {
    const { lost } = told(g, step);
    return lost.length ? [`${g.buffers.join(", ")} ${g.buffers.length > 1 ? "lose" : "loses"} ${tokens(lost)}`] : [];
  });
  $(`${side}-said`).textContent = `Token ${step}: writes ${size(sum(bytes.written))}, reads ${size(sum(bytes.read))} of ` +
    `${size(sum(bytes.stored))} stored. ${loses.length ? loses.join("; ") + "." : "No slot is given up."}`;
  $(`${side}-strips`).replaceChildren(...one.groups.flatMap((group) => strip(group, step)));
  const scale = Math.max(...SIDES.flatMap((s) => {
    const { cost } = BY_NAME[state[s].name].settings[state[s].setting];
    return MOVED.flatMap((what) => cost[what].map(sum));
  }));
  $(`${side}-meters`).replaceChildren(...meters(bytes, one.buffers, scale));
  $(`${side}-bytes`).replaceChildren(table([{ buffers: one.buffers, bytes }], `bytes of this step, ${name}`));
  for (const now of document.querySelectorAll(`#${side} .now`)) now.setAttribute("y", step);
}

function strip(group, step) {
  const row = group.steps[step], held = writers(group, step), { text } = told(group, step);
  const title = make("h3", {}, make("span", { class: "names" }, group.buffers.join(", ")), `: ${group.kept}`);
  const cells = make("div", { class: "slots", role: "img", "aria-label": `${group.buffers.join(", ")}: ${text}` });
  [...row].forEach((letter, i) => {
    const cell = make("span", { class: `slot ${kind(letter)}`, "data-letter": letter, "aria-hidden": "true" });
    const whose = held[i] === null ? "" : `, written by token ${held[i]}`;
    cell.title = `${isState(group) ? "state" : "slot " + i}: ${DATA.kinds[letter]}${whose}`;
    cell.append(letter === "." ? "" : letter, make("small", {}, held[i] === null ? "" : String(held[i])));
    cells.append(cell);
  });
  if (isState(group)) cells.classList.add("state");
  return [title, make("p", { class: "did" }, text), cells];
}

/* All steps of a group: steps down; across the token in the slot, or the entry at the tokens that it stands for. */
function drawHistories(side) {
  const { name, setting } = state[side], one = BY_NAME[name].settings[setting];
  const shown = one.groups.filter((group) => !isState(group));
  $(`${side}-histories`).replaceChildren(...shown.map((group) => {
    const byToken = !group.steps.some((row) => row.includes("e")), wide = byToken ? 1 : DATA.steps / group.slots;
    const paths = {}, held = Array(group.slots).fill(null);
    group.steps.forEach((row, t) => {
      [...row].forEach((letter, i) => {
        if ("wxe".includes(letter)) held[i] = t;
        if (letter === ".") return;
        const x = byToken ? held[i] : i * wide;
        (paths[letter] ||= []).push(`M${+x.toFixed(3)} ${t}h${+wide.toFixed(3)}v1h-${+wide.toFixed(3)}z`);
      });
    });
    const label = `${group.buffers.join(", ")}, all ${DATA.steps} steps`;
    const svg = make("svg", { viewBox: `0 0 ${DATA.steps} ${DATA.steps}`, role: "img", "aria-label": label });
    for (const [letter, parts] of Object.entries(paths)) svg.append(make("path", { class: kind(letter), d: parts.join("") }));
    svg.append(make("rect", { class: "now", x: 0.25, y: state.step, width: DATA.steps - 0.5, height: 1 }));
    svg.addEventListener("click", (event) => {
      const box = svg.getBoundingClientRect();
      go(Math.floor(((event.clientY - box.top) / box.height) * DATA.steps));
    });
    const across = byToken ? "tokens" : "entries";
    return make("div", {}, make("p", {}, make("span", { class: "names" }, group.buffers.join(", ")), `: ${across} across, steps down`), svg);
  }));
  $(`${side}-histories`).parentElement.hidden = !shown.length;
}

/* Shipped models. */
function drawModel(side) {
  const model = BY_NAME[state[side].name].models[state[side].model];
  const box = $(`${side}-model-box`);
  if (!model) return box.replaceChildren(make("p", {}, "No shipped model has this mechanism."));
  const buffers = model.buffers[state.dtype], bytes = modelBytes(model, state.context);
  const scale = Math.max(...SIDES.flatMap((s) => {
    const other = BY_NAME[state[s].name].models[state[s].model];
    return other ? Object.values(modelBytes(other, state.context)).map(sum) : [];
  }));
  const [stored, read] = [sum(bytes.stored), sum(bytes.read)];
  const share = stored ? ` That is ${decimal((100 * read) / stored)}% of what is stored.` : "";
  const label = `bytes of ${model.name}`;
  box.replaceChildren(
    make("p", { class: "said" }, `${isAre(state.batch, "row", "rows")} of ${whole(DATA.contexts[state.context])} tokens: stores ` +
      `${size(stored)}; a step reads ${size(read)}.${share}`),
    make("div", { class: "meters" }, ...meters(bytes, buffers, scale)),
    table([{ buffers, bytes }], label),
    make("p", { class: "did" }, `One more token of a row stores ${model.per_token[state.dtype]} B.`));
}
function modelBytes(model, context) {
  const cost = model.cost[state.dtype];
  return Object.fromEntries(MOVED.map((what) => [what, cost[what][context].map((n) => n * state.batch)]));
}

/* Stored and read of both models over the context. */
function drawChart() {
  const width = Math.max(280, $("chart").clientWidth), height = width < 500 ? 300 : 340;
  const left = 74, right = width < 600 ? 16 : 190, top = 22, bottom = 40;
  const lines = SIDES.flatMap((side) => {
    const { name, model } = state[side], one = BY_NAME[name].models[model];
    return one ? ["stored", "read"].map((what) => ({ side, what, name: `${name}, ${one.name}`,
      values: DATA.contexts.map((_, i) => sum(modelBytes(one, i)[what])) })) : [];
  });
  const logs = lines.flatMap((line) => line.values.filter(Boolean).map(Math.log2));
  if (!logs.length) return $("chart").replaceChildren();
  const low = Math.floor(Math.min(...logs)), high = Math.max(low + 2, Math.ceil(Math.max(...logs)));
  const x = (i) => left + (i / (DATA.contexts.length - 1)) * (width - left - right);
  const y = (bytes) => top + ((high - Math.log2(bytes)) / (high - low)) * (height - top - bottom);
  const svg = make("svg", { width, height, role: "img", "aria-label":
    lines.map((l) => `${l.name} ${l.what}: ${size(l.values[0])} at ${whole(DATA.contexts[0])} tokens, ${size(l.values.at(-1))} at ` +
      `${whole(DATA.contexts.at(-1))}`).join("; ") });
  const stride = Math.max(1, Math.ceil((high - low) / 7));
  for (let p = high; p >= low; p -= stride) {
    svg.append(make("line", { class: "grid", x1: left, x2: width - right, y1: y(2 ** p), y2: y(2 ** p) }),
      make("text", { x: left - 8, y: y(2 ** p) + 4, "text-anchor": "end" }, size(2 ** p)));
  }
  DATA.contexts.forEach((tokens, i) => {
    if (width < 600 && i % 2) return;
    const label = tokens < 2 ** 20 ? `${tokens / 1024}k` : `${tokens / 2 ** 20}m`;
    svg.append(make("text", { x: x(i), y: height - bottom + 20, "text-anchor": "middle" }, label));
  });
  svg.append(make("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, "tokens in each row"));
  svg.append(make("line", { class: "grid", x1: x(state.context), x2: x(state.context), y1: top, y2: height - bottom,
    "stroke-dasharray": "2 3" }));
  for (const line of lines) {
    const points = line.values.map((v, i) => [x(i), y(Math.max(v, 2 ** low))]);
    svg.append(make("path", { class: `line ${line.side} ${line.what === "read" ? "reads" : ""}`, d: "M" + points.map((p) =>
      p.map((n) => n.toFixed(1)).join(" ")).join("L") }));
    const [cx, cy] = points[state.context], mark = { class: `mark ${line.side}`, "stroke-linejoin": "round" };
    svg.append(line.side === "a" ? make("circle", { ...mark, cx, cy, r: 4.5 })
      : make("rect", { ...mark, x: cx - 4.5, y: cy - 4.5, width: 9, height: 9 }));
  }
  label(svg, lines, { width, right, top, y, low });
  $("chart").replaceChildren(svg);
}

/* Names at the right end of the lines, pushed apart; above the lines where there is no room beside them. */
function label(svg, lines, { width, right, top, y, low }) {
  if (right < 100) {
    lines.filter((l) => l.what === "stored").forEach((l, i) => svg.append(make("text", { class: `name-${l.side}`, x: i ? width - 4 : 4,
      y: 14, "text-anchor": i ? "end" : "start" }, `${l.side === "a" ? "\u25cb" : "\u25a1"} ${l.name.split(",")[0]}`)));
    return;
  }
  const ends = lines.filter((l) => l.what === "stored" || l.values.at(-1) !== lines.find((o) => o.side === l.side).values.at(-1))
    .map((l) => ({ ...l, at: y(Math.max(l.values.at(-1), 2 ** low)) })).sort((a, b) => a.at - b.at);
  ends.forEach((l, i) => { if (i) l.at = Math.max(l.at, ends[i - 1].at + 17); });
  for (const l of ends) svg.append(make("text", { class: `name-${l.side}`, x: width - right + 10, y: Math.max(top + 4, l.at + 4) },
    `${l.side === "a" ? "\u25cb" : "\u25a1"} ${l.name.split(",")[0]} ${l.what}`));
}

/* Equations. */
function drawText(side) {
  const { name } = state[side], { text } = BY_NAME[name];
  $(`${side}-text`).replaceChildren(make("h3", { class: "names" }, name), ...text.map(([tag, words]) => tag === "pre"
    ? make("pre", { tabindex: "0", role: "group", "aria-label": `equations of ${name}` }, words) : make("p", {}, ...code(words))));
}
const code = (words) => words.split("`").map((part, i) => (i % 2 ? make("code", {}, part) : part));

/* Wiring. */
function build() {
  for (const side of SIDES) {
    const title = side === "a" ? "first" : "second";
    $("step-sides").append(make("article", { class: `side ${side}`, id: side, "aria-label": `${title} mechanism` },
      make("div", { class: "controls" },
        make("label", {}, "Mechanism ", make("select", { id: `${side}-name` })),
        make("label", {}, "Sizes ", make("select", { id: `${side}-setting` }))),
      make("p", { class: "summary", id: `${side}-summary` }),
      make("p", { class: "said", id: `${side}-said`, role: "status" }),
      make("div", { class: "meters", id: `${side}-meters` }),
      make("div", { id: `${side}-strips` }),
      make("figure", {}, make("figcaption", {}, `All ${DATA.steps} steps; the outlined line is this one. What is blank is not in the cache.`),
        make("div", { class: "histories", id: `${side}-histories` })),
      make("div", { id: `${side}-bytes` })));
    $("model-sides").append(make("article", { class: `side ${side}`, "aria-label": `model of the ${title} mechanism` },
      make("div", { class: "controls" }, make("label", {}, make("span", { class: "names", id: `${side}-of` }), " Model ",
        make("select", { id: `${side}-model` }))), make("div", { id: `${side}-model-box` })));
    $("text-sides").append(make("article", { class: `side ${side}`, id: `${side}-text`, "aria-label": `equations of the ${title} mechanism` }));
    options($(`${side}-name`), DATA.mechanisms.map((m) => m.name), DATA.mechanisms.findIndex((m) => m.name === state[side].name));
    $(`${side}-name`).onchange = (e) => {
      state[side] = { name: DATA.mechanisms[e.target.selectedIndex].name, setting: 0, model: 0 };
      draw();
    };
    $(`${side}-setting`).onchange = (e) => { state[side].setting = e.target.selectedIndex; draw(); };
    $(`${side}-model`).onchange = (e) => { state[side].model = e.target.selectedIndex; draw(); };
  }
  $("legend").append(...Object.entries(DATA.kinds).map(([letter, words]) => make("li", {},
    make("span", { class: `slot ${kind(letter)}`, "aria-hidden": "true" }, letter === "." ? "" : letter), words)),
  make("li", {}, "the number in a slot: the token whose step wrote it"));
  options($("context"), DATA.contexts.map(whole), state.context);
  options($("dtype"), DATA.dtypes, DATA.dtypes.indexOf(state.dtype));
  $("batch").value = state.batch;
  $("context").onchange = (e) => { state.context = e.target.selectedIndex; draw(); };
  $("dtype").onchange = (e) => { state.dtype = DATA.dtypes[e.target.selectedIndex]; draw(); };
  $("batch").oninput = (e) => {
    const rows = count(e.target, "Rows", 4096, $("batch-error"));
    if (rows) { state.batch = rows; draw(); }
  };
  $("step").oninput = (e) => go(Number(e.target.value));
  $("back").onclick = () => go(state.step - 1);
  $("on").onclick = () => go(state.step + 1);
  document.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: state.step - 1, ArrowRight: state.step + 1, Home: 0, End: LAST }[event.key];
    if (to === undefined || event.ctrlKey || event.altKey || event.metaKey || event.target.closest("select, input, pre, .scroll")) return;
    event.preventDefault();
    go(to);
  });
  new ResizeObserver(drawChart).observe($("chart"));
}

function go(step) {
  state.step = Math.min(LAST, Math.max(0, step));
  drawSteps();
  toAddress();
}
function drawSteps() {
  $("step").value = state.step;
  $("step").setAttribute("aria-valuetext", `token ${state.step}`);
  $("position").textContent = `${state.step} (${isAre(state.step + 1, "token", "tokens")} in the row)`;
  SIDES.forEach(drawStep);
}
function draw() {
  for (const side of SIDES) {
    const { name, setting, model } = state[side], one = BY_NAME[name];
    options($(`${side}-setting`), one.settings.map((s) => s.label), setting);
    options($(`${side}-model`), one.models.map((m) => m.name), model);
    $(`${side}-summary`).textContent = `${one.summary[0].toUpperCase()}${one.summary.slice(1)}. Trade: ${one.traded}.`;
    $(`${side}-of`).textContent = name;
    drawHistories(side);
    drawModel(side);
    drawText(side);
  }
  drawSteps();
  drawChart();
  toAddress();
}

fromAddress();
build();
draw();
})();
