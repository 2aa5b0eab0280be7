/* A config.json as the lens reads it: whole numbers of any size stay whole, and what Python's reader refuses is refused. */
const json = (() => {
const DEEPEST = 500;
const NUMBER = /-?(?:0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?/y, SPACE = /[ \t\n\r]*/y, WORD = /-?[A-Za-z]+/y;
const STRING = /"(?:[^"\\\u0000-\u001f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"/y;
const WORDS = { true: true, false: false, null: null };
const DIGITS = 4300;  // of a whole number, as Python
class Refusal extends Error {}

/* The value in a text: objects as std.dict, arrays as arrays, numbers without a point as BigInt. Throws a Refusal whose
   message is one line. */
function parse(text) {
  let at = 0;
  const fail = (what) => { throw new Refusal(`the text is not JSON: line ${text.slice(0, at).split("\n").length}: ${what}`); };
  const take = (pattern) => {
    pattern.lastIndex = at;
    const found = pattern.exec(text);
    if (found) at = pattern.lastIndex;
    return found;
  };
  const taken = (letter) => { take(SPACE); return text[at] === letter && ++at > 0; };
  const string = () => { take(SPACE); return JSON.parse((take(STRING) ?? fail("a string in double quotes is expected"))[0]); };

  function series(end, depth, one) {
    if (depth > DEEPEST) throw new Refusal("the text is not a config: its brackets are nested too deeply");
    const found = [];
    if (taken(end)) return found;
    do found.push(one(depth + 1)); while (taken(","));
    return taken(end) ? found : fail(`a comma or ${end} is expected`);
  }
  const entry = (depth) => {
    const name = string();
    return taken(":") ? [name, value(depth)] : fail("a colon is expected");
  };
  function object(depth) {
    const entries = series("}", depth, entry), names = entries.map(([name]) => name);
    if (new Set(names).size === names.length) return std.dict(entries);
    const twice = names.find((name, i) => names.indexOf(name) < i);
    throw new Refusal(`the key ${std.repr(twice)} stands twice in one object`);
  }
  function value(depth = 0) {
    if (taken("{")) return object(depth);
    if (taken("[")) return series("]", depth, value);
    if (text[at] === '"') return string();
    const number = take(NUMBER);
    if (number) return number[1] || number[2] ? float(number[0]) : integer(number[0]);
    const word = take(WORD)?.[0] ?? "";
    if (Object.hasOwn(WORDS, word)) return WORDS[word];
    return /^-?(NaN|Infinity)$/.test(word) ? float(word) : fail("a value is expected");
  }
  text = text.replace(/^\ufeff/, "");
  const found = value();
  take(SPACE);
  if (at < text.length) fail("there is more after the value");
  if (std.isinstance(found, std.dict)) return found;
  throw new Refusal(`the text holds ${Array.isArray(found) ? "a list" : std.repr(found)}; it must hold an object`);
}

function integer(text) {
  if (text.length > DIGITS) throw new Refusal(`the number ${text.slice(0, 20)}... has more than ${DIGITS} digits`);
  return BigInt(text);
}
/* The number that is written there; not one that only comes near, where it is whole. */
function float(text) {
  const value = Number(text), whole = exact(text);
  if (!Number.isFinite(value) || (whole === null ? value === 0 : BigInt(value) !== whole)) {
    throw new Refusal(`the number ${text.slice(0, 100)} cannot be kept exactly: it reads as ${std.repr(value)}`);
  }
  return value;
}
/* A number with a point or an exponent as a BigInt, null where it is not whole or its exponent is beyond any float's. */
function exact(text) {
  const [, sign, digits, more = "", power = "0"] = /^(-?)(\d+)(?:\.(\d+))?(?:[eE]([+-]?\d+))?$/.exec(text) ?? [];
  if (digits === undefined || Math.abs(power) > 400) return null;
  const zeros = Number(power) - more.length, all = sign + digits + more;
  if (zeros >= 0) return BigInt(all) * 10n ** BigInt(zeros);
  return BigInt(all) % 10n ** BigInt(-zeros) ? null : BigInt(all) / 10n ** BigInt(-zeros);
}

return { parse, Refusal };
})();
