/* The panel of a pasted config.json. What it says is what jforge.explorer.panel.answer says, of which `lens` is the
   translation; here it is only asked and shown. */
(() => {
const { $, MOVED, make, options, count, meters, table } = parts;
const OFFER = JSON.parse($("offer").textContent);
const EXAMPLES = Object.keys(OFFER.examples);
const DTYPES = [null, ...OFFER.dtypes];
const WAIT = 150;  // milliseconds without a key, before a text is read
const LONG = 240;  // characters of a refusal
const LINE = $("config-error");

/* The answer's dicts as objects; its integers stay BigInts. */
function plain(x) {
  if (Array.isArray(x)) return x.map(plain);
  return std.isinstance(x, std.dict) ? Object.fromEntries(std.pairs(x).map(([k, value]) => [k, plain(value)])) : x;
}
/* What the text and these sizes give. Throws an error whose message is one line. */
function answer(text, context, batch, dtype = null, encoderTokens = null) {
  const [tokens, rows, encoder] = [context, batch, encoderTokens].map((n) => (n === null ? null : BigInt(n)));
  return plain(lens(json.parse(text), tokens, rows, dtype, encoder));
}

/* The sizes of the form, or null where one is no whole number. */
function sizes() {
  const context = count($("config-context"), "Tokens in each row", 2 ** 30, LINE);
  const batch = context && count($("config-batch"), "Rows", 2 ** 20, LINE);
  const none = !$("config-encoder").value && !$("config-encoder").validity.badInput;
  const encoder = batch && !none ? count($("config-encoder"), "Tokens of an encoder", 2 ** 30, LINE) : null;
  return batch && (none || encoder) ? [context, batch, DTYPES[$("config-dtype").selectedIndex], encoder] : null;
}

function update() {
  const asked = sizes(), text = $("config-text").value;
  $("config-answer").hidden = true;
  $("config-more").textContent = "";
  if (!asked) return;
  if (!text.trim()) return refuse("There is no config.json yet: paste one, choose a file or an example.");
  try {
    show(answer(text, ...asked));
  } catch (error) {
    const said = ["ValueError", "NotImplementedError"].some((name) => std.isinstance(error, std[name]));
    refuse(said || error instanceof json.Refusal ? error.message : `This file is not understood: ${error.message}`);
  }
}
/* In one line. Of a long one, which lists what is known, the list stands below. */
function refuse(message) {
  const line = message.replace(/\s+/g, " "), end = line.length > LONG ? line.indexOf("; ") : -1;
  LINE.textContent = end < 0 ? line : `${line.slice(0, end)}.`;
  $("config-more").textContent = end < 0 ? "" : line.slice(end + 2);
}

function show({ first, step, counted, kinds, lines, data }) {
  const buffers = Object.entries(data.rows[0].buffers).map(([name, moved]) => ({ name, ...moved }));
  const bytes = Object.fromEntries(MOVED.map((what) => [what, buffers.map((one) => Number(one[what]))]));
  const scale = Math.max(...MOVED.map((what) => parts.sum(bytes[what])));
  LINE.textContent = "";
  $("config-first").textContent = first;
  $("config-step").textContent = step;
  $("config-meters").replaceChildren(...meters(bytes, buffers, scale));
  $("config-table").replaceChildren(...(kinds.length ? [table(kinds, `bytes of ${counted}`)] : []));
  $("config-counted").textContent = `${counted}; bytes are of all layers of a kind together.`;
  $("config-lines").replaceChildren(...lines.map((line) => make("li", {}, line)));
  $("config-answer").hidden = false;
}

/* A text from elsewhere; example: its number, -1 for none. */
function fill(text, example) {
  $("config-text").value = text;
  $("config-example").selectedIndex = example + 1;
  update();
}
async function read(file) {
  const bytes = await file.arrayBuffer();
  try {
    fill(new TextDecoder("utf-8", { fatal: true }).decode(bytes), -1);
  } catch {
    fill("", -1);
    refuse(`${file.name} is not a text file in UTF-8.`);
  }
}

options($("config-example"), ["none", ...EXAMPLES], 0);
options($("config-dtype"), ["as the file says", ...OFFER.dtypes], 0);
$("config-example").onchange = ({ target }) => {
  const example = target.selectedIndex - 1;
  fill(example < 0 ? "" : OFFER.examples[EXAMPLES[example]], example);
};
$("config-file").onchange = ({ target }) => { if (target.files.length) read(target.files[0]); };
let waiting;
$("config-text").oninput = () => {
  $("config-example").selectedIndex = 0;
  clearTimeout(waiting);
  waiting = setTimeout(update, WAIT);
};
for (const id of ["config-context", "config-batch", "config-encoder"]) $(id).oninput = update;
$("config-dtype").onchange = update;
fill(OFFER.examples[OFFER.first], EXAMPLES.indexOf(OFFER.first));
window.jforge = { answer };  // for a console: jforge.answer(text, 8192, 1)
})();
