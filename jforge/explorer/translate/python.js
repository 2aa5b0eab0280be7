/* What translated functions need of Python beside its numbers: functions, classes, dicts and the parts of its library that
   they call. A str is a string, a list an array, None null; undefined is no value. What Python would refuse with a
   TypeError throws one here. */
const std = (() => {
const impossible = (what) => { throw std.TypeError(what); };

/* Functions. Arguments by name come last, as a Named. */
class Named { constructor(given) { Object.assign(this, given); } }
const namedOf = (args) => (args.at(-1) instanceof Named ? args.pop() : {});

function def(name, positional, more, keywords, rest, call) {
  const width = positional.length, plain = !more && !rest && !keywords.length;
  return (...args) => {
    if (plain && args.length === width && !(args.at(-1) instanceof Named)) return call(...args) ?? null;
    const named = { ...namedOf(args) };
    const take = ([parameter, usual], given) => {
      const found = given !== undefined ? given : Object.hasOwn(named, parameter) ? named[parameter] : usual;
      if (found === undefined) impossible(`${name} is given no ${parameter}`);
      if (given === undefined) delete named[parameter];
      return found;
    };
    const bound = positional.map((one, i) => take(one, args[i]));
    if (more) bound.push(tuple(args.slice(width)));
    else if (args.length > width) impossible(`${name} takes ${width} arguments`);
    bound.push(...keywords.map((one) => take(one)));
    if (rest) bound.push(dict(Object.entries(named)));
    else if (Object.keys(named).length) impossible(`${name} has no parameter ${Object.keys(named)[0]}`);
    return call(...bound) ?? null;
  };
}

/* Classes. One is a function that makes objects and has its methods as Python's class has them, self first; `methods` is
   what its objects inherit. A record (a dataclass or NamedTuple) is made from its fields and equals one with equal ones. */
let classes = 0;
function newClass(name, module, parent, record, fields) {
  const made = (...args) => {
    const self = Object.create(made.methods);
    if (made.__init__) made.__init__(self, ...args);
    else fill(self, made, args);
    if (made.__post_init__) made.__post_init__(self);
    return self;
  };
  const own = fields.map(([field, usual, compared = true]) => ({ field, usual, compared }));
  const inherited = (parent?.fields ?? []).filter((old) => !own.some(({ field }) => field === old.field));
  Object.setPrototypeOf(made, parent);
  Object.defineProperty(made, "name", { value: name });
  for (const { field, usual } of own) if (usual !== undefined) made[field] = usual;
  return Object.assign(made, {
    __name__: name, __qualname__: name, __module__: module, number: ++classes, record, fields: [...inherited, ...own],
    methods: Object.create(parent?.methods ?? Object.prototype, { type: { value: made } }),
  });
}
function fill(self, type, args) {
  const named = namedOf(args);
  const unknown = Object.keys(named).find((name) => !type.fields.some(({ field }) => field === name));
  if (unknown) impossible(`${type.name} has no field ${unknown}`);
  type.fields.forEach(({ field, usual }, i) => {
    self[field] = i < args.length ? args[i] : Object.hasOwn(named, field) ? named[field] : usual;
    if (self[field] === undefined) impossible(`${type.name} is given no ${field}`);
  });
}
function method(type, name, call) {
  type[name] = call;
  type.methods[name] = function (...args) { return call(this, ...args); };
}
const property = (type, name, call) => Object.defineProperty(type.methods, name, { get() { return call(this); } });
const cached_property = (type, name, call) => Object.defineProperty(type.methods, name, { get() {
  const value = call(this);
  Object.defineProperty(this, name, { value });
  return value;
} });
const base = (type, self, name) => (...args) => Object.getPrototypeOf(type)[name](self, ...args);
const isRecord = (x) => x?.type?.record === true;
const values = (x) => x.type.fields.map(({ field }) => x[field]);
const replace = (x, changed) => x.type(new Named({
  ...Object.fromEntries(x.type.fields.map(({ field }) => [field, x[field]])), ...changed }));

/* Exceptions: `message` is what str() says. */
function exception(name, parent = null) {
  const made = newClass(name, "builtins", parent, false, []);
  if (parent) return made;
  Object.setPrototypeOf(made.methods, Error.prototype);
  return Object.assign(made, { __init__: (self, ...args) => { self.message = args.map(str).join(", "); } });
}
const Exception = exception("Exception");

/* Text by which equal values are found: that of a string is itself, of all else it begins with a zero. */
const identities = new WeakMap();
let objects = 0;
function key(x) {
  if (typeof x === "string") return x;
  if (x === null) return "\0None";
  if (numbers.isNumber(x)) return `\0${numbers.key(x)}`;
  if (Array.isArray(x)) return `\0${x instanceof Tuple ? "(" : "["}${Array.from(x, counted).join()}`;
  if (x instanceof PySet) return `\0set${x.keys().map(counted).sort().join()}`;
  if (isMapping(x)) return `\0{${pairs(x).map(key).sort().map(counted).join()}`;
  if (isRecord(x)) return `\0#${x.type.number}${key(x.type.fields.filter((f) => f.compared).map(({ field }) => x[field]))}`;
  if (!identities.has(x)) identities.set(x, `\0@${++objects}`);
  return identities.get(x);
}
const counted = (x) => { const text = key(x); return `${text.length}:${text}`; };  // so that no two lists share a text
const eq = (a, b) => a === b || key(a) === key(b);

/* Containers. Pairs (of items(), zip and enumerate) are plain arrays: nothing compares them with tuples. */
class Tuple extends Array {}
const tuple = (items = []) => Object.setPrototypeOf([...iter(items)], Tuple.prototype);  // Tuple.from is slower by far
class Dict {
  constructor(entries) {  // arrays [key, value], which are kept and never changed
    this.held = new Map();
    for (const pair of entries) this.held.set(key(pair[0]), pair);
  }
  has(k) { return this.held.has(key(k)); }
  get(k, usual = null) { const pair = this.held.get(key(k)); return pair ? pair[1] : usual; }
  put(k, value) { this.held.set(key(k), [k, value]); }
  setdefault(k, usual = null) { if (!this.has(k)) this.put(k, usual); return this.get(k); }
  pop(k, usual) {
    const found = this.has(k) ? this.get(k) : usual;
    this.held.delete(key(k));
    return found === undefined ? missing(k) : found;
  }
  keys() { return Array.from(this.held.values(), (pair) => pair[0]); }
  values() { return Array.from(this.held.values(), (pair) => pair[1]); }
  items() { return [...this.held.values()]; }
}
class Counter extends Dict { get(k) { return super.get(k, 0n); } }
class PySet extends Dict { constructor(items) { super([...iter(items)].map((x) => [x, x])); } }
const missing = (k) => { throw std.KeyError(repr(k)); };
const dict = (entries = []) => new Dict(isMapping(entries) ? pairs(entries) : [...iter(entries)]);
dict.fromkeys = (keys, value = null) => new Dict([...iter(keys)].map((k) => [k, value]));

const Mapping = newClass("Mapping", "collections.abc", null, false, []);  // of classes with __getitem__ and __iter__
method(Mapping, "get", (self, k, usual = null) => (contains(self, k) ? item(self, k) : usual));
method(Mapping, "keys", (self) => [...iter(self)]);
method(Mapping, "values", (self) => pairs(self).map(([, value]) => value));
method(Mapping, "items", (self) => pairs(self));
const isMapping = (x) => (x instanceof Dict && !(x instanceof PySet)) || Mapping.methods.isPrototypeOf(x);
const pairs = (x) => (x instanceof Dict ? x.items() : [...iter(x)].map((k) => [k, item(x, k)]));

function iter(x) {
  if (x instanceof Dict) return x.keys();
  if (x?.__iter__) return x.__iter__();
  if (isRecord(x)) return values(x);
  return typeof x?.[Symbol.iterator] === "function" ? x : impossible(`${repr(x)} is not iterable`);
}
function item(x, at) {
  if (x instanceof Dict) return x instanceof Counter || x.has(at) ? x.get(at) : missing(at);
  if (x?.__getitem__) return x.__getitem__(at);
  if (!Array.isArray(x) && typeof x !== "string") impossible(`${repr(x)} has no items`);
  const found = x[at < 0n ? BigInt(x.length) + at : at];
  if (found === undefined) throw std.IndexError(`there is no item ${at}`);
  return found;
}
const slice = (x, from, to) => (isRecord(x) ? tuple(x) : x).slice(...[from ?? 0n, to ?? BigInt(len(x))].map(Number));
const put = (x, at, value) => { if (x instanceof Dict) x.put(at, value); else x[at] = value; };
const remove = (x, at) => { x.pop(at); };
const len = (x) => (x?.__len__ ? x.__len__()
  : BigInt(x instanceof Dict ? x.held.size : isRecord(x) ? values(x).length : x.length));
function contains(x, one) {
  if (x instanceof Dict) return x.has(one);
  if (typeof x !== "string") return [...iter(x)].some((other) => eq(other, one));
  return typeof one === "string" ? x.includes(one) : impossible(`${repr(x)} has no part ${repr(one)}`);
}
function truth(x) {
  if (x === null || x === false || x === "" || x === 0 || x === 0n) return false;
  return x instanceof Dict || Array.isArray(x) || x.__len__ ? len(x) > 0n : true;
}
function any_of(...makers) { let x; for (const make of makers) if (truth(x = make())) break; return x; }
function all_of(...makers) { let x; for (const make of makers) if (!truth(x = make())) break; return x; }

/* Operators of more than numbers. */
const calculated = (operate, ...of) => {
  try { return operate(...of); } catch (error) { return impossible(`${of.map(repr).join(", ")}: ${error.message}`); }
};
function add(a, b, inPlace = false) {
  if (typeof a === "string" && typeof b === "string") return a + b;
  if (a?.__add__) return a.__add__(b);
  if (!Array.isArray(a) || !Array.isArray(b)) return calculated(numbers.add, a, b);
  if (!inPlace || a instanceof Tuple) return a.concat(b);
  a.push(...b);
  return a;
}
function mul(a, b) {
  if (a?.__mul__) return a.__mul__(b);
  if (!Array.isArray(a) && typeof a !== "string") return calculated(numbers.mul, a, b);
  const parts = Array(Math.max(0, Number(b))).fill(a);
  return typeof a === "string" ? parts.join("") : a.constructor.from(parts.flat());
}
function sub(a, b) {
  return a instanceof PySet ? new PySet(a.keys().filter((x) => !contains(b, x))) : calculated(numbers.sub, a, b);
}
function or(a, b, inPlace = false) {
  if (!isMapping(a)) return a instanceof PySet ? new PySet([...a.keys(), ...b.keys()]) : calculated(numbers.or, a, b);
  if (!inPlace) return dict([...pairs(a), ...pairs(b)]);
  for (const [k, value] of pairs(b)) a.put(k, value);
  return a;
}
const compare = (a, b) => (typeof a === "string" && typeof b === "string" ? (a < b ? -1 : Number(a > b))
  : calculated(numbers.compare, a, b));
const [neg, div, floordiv, mod, pow, and] = [(x) => calculated(numbers.mul, x, -1n),
  ...["div", "floordiv", "mod", "pow", "and"].map((name) => (a, b) => calculated(numbers[name], a, b))];
const lt = (a, b) => compare(a, b) < 0, le = (a, b) => compare(a, b) <= 0;
const gt = (a, b) => compare(a, b) > 0, ge = (a, b) => compare(a, b) >= 0;
const chain = (items, tests) => tests.every((test, i) => test(items[i], items[i + 1]));

/* Text. */
const str = (x) => (typeof x === "string" ? x : x instanceof Error ? x.message : repr(x));
function repr(x) {
  if (x === null) return "None";
  if (typeof x === "boolean") return x ? "True" : "False";
  if (typeof x === "number") return numbers.floatText(x);
  if (typeof x === "string") return quoted(x);
  if (Array.isArray(x)) {
    const inner = Array.from(x, repr).join(", ");
    return x instanceof Tuple ? `(${inner}${x.length === 1 ? "," : ""})` : `[${inner}]`;
  }
  if (isMapping(x)) return `{${pairs(x).map(([k, value]) => `${repr(k)}: ${repr(value)}`).join(", ")}}`;
  return x?.text ?? `${x?.__name__ ?? x}`;
}
function quoted(x) {
  const inner = JSON.stringify(x).slice(1, -1).replaceAll('\\"', '"');
  return x.includes("'") && !x.includes('"') ? `"${inner}"` : `'${inner.replaceAll("'", "\\'")}'`;
}
const format = (x, how) => calculated(numbers.format, x, how);
const STRINGS = {
  lower: (s) => s.toLowerCase(), isdigit: (s) => /^\d+$/.test(s), replace: (s, old, other) => s.replaceAll(old, other),
  startswith: (s, start) => s.startsWith(start), endswith: (s, end) => s.endsWith(end),
  join: (s, items) => [...iter(items)].join(s), split: (s) => s.trim().split(/\s+/),
  rpartition: (s, by) => {  // of a text that holds the separator
    const at = s.lastIndexOf(by);
    return [s.slice(0, at), by, s.slice(at + by.length)];
  },
};
const LISTS = {
  append: (list, x) => { list.push(x); }, count: (list, x) => BigInt(list.filter((one) => eq(one, x)).length),
};
function attr(x, name) {
  const calls = typeof x === "string" ? STRINGS : Array.isArray(x) ? LISTS : null;
  if (calls) return calls[name] ? (...args) => calls[name](x, ...args) ?? null : impossible(`${repr(x)} has no ${name}`);
  if (name === "_replace" && isRecord(x)) return (changed) => replace(x, changed);
  const found = x?.[name];
  if (found === undefined) impossible(`${repr(x)} has no ${name}`);
  return typeof found === "function" && typeof x === "object" && !Object.hasOwn(x, name) ? found.bind(x) : found;
}

/* Types that make a value and know theirs. */
const type = (name, make, is) => Object.assign(make, { is, __name__: name });
const WHOLE = /^\s*[+-]?\d+\s*$/;
const int = (x) => {
  if (typeof x !== "string") return calculated(numbers.int, x);
  if (WHOLE.test(x)) return BigInt(x);
  throw std.ValueError(`invalid literal for int() with base 10: ${repr(x)}`);
};
const TYPES = {
  list: type("list", (items = []) => [...iter(items)], (x) => Array.isArray(x) && !(x instanceof Tuple)),
  tuple: type("tuple", tuple, (x) => x instanceof Tuple),
  dict: type("dict", dict, (x) => x instanceof Dict && !(x instanceof PySet)),
  str: type("str", str, (x) => typeof x === "string"), int: type("int", int, numbers.isInt),
  bool: type("bool", truth, (x) => typeof x === "boolean"),
  float: type("float", numbers.float, (x) => typeof x === "number"),
  set: type("set", (items = []) => new PySet(items), (x) => x instanceof PySet),
};
const NoneType = { is: (x) => x === null, __name__: "NoneType" };
const typeOf = (x) => x?.type ?? [NoneType, ...Object.values(TYPES)].findLast((one) => one.is(x));
function isinstance(x, types) {
  const known = (one) => (one === Mapping ? isMapping(x) : one.is ? one.is(x) : one.methods.isPrototypeOf(x));
  return Array.isArray(types) ? types.some(known) : known(types);
}

/* Dtypes of caches, as jax.numpy names them. */
const WIDTHS = { bfloat16: 2n, float16: 2n, float32: 4n, int8: 1n, float8_e4m3fn: 1n, float8_e5m2: 1n };
const DTYPES = Object.fromEntries(Object.entries(WIDTHS).map(([text, itemsize]) => [text, { text, itemsize }]));
const dtype = (name) => (typeof name === "string" ? DTYPES[name] ?? impossible(`${name} is no dtype`) : name);
const wider = (...names) => names.map(dtype).reduce((a, b) => (b.itemsize > a.itemsize ? b : a));

/* Functions over iterables. */
const extreme = (sign) => (...args) => {
  const named = namedOf(args), items = args.length > 1 ? args : [...iter(args[0])];
  if (items.length) return items.reduce((a, b) => (sign * compare(b, a) > 0 ? b : a));
  return "default" in named ? named.default : impossible("there is nothing to compare");
};
function zip(...args) {
  const { strict } = namedOf(args), lists = args.map((x) => [...iter(x)]), least = Math.min(...lists.map((x) => x.length));
  if (strict && lists.some((x) => x.length > least)) throw std.ValueError("zip() argument is longer than another");
  return Array.from({ length: least }, (_, i) => lists.map((x) => x[i]));
}
function* range(...ends) {
  const [from, to] = ends.length > 1 ? ends : [0n, ends[0]];
  for (let i = from; i < to; i++) yield i;
}
function next(items, usual) {
  for (const x of items) return x;
  return usual === undefined ? impossible("there is no next one") : usual;
}
const listed = (call) => (...args) => call(...args.slice(0, -1), [...iter(args.at(-1))]);  // the last argument as an array

return {
  ...TYPES, class: newClass, method, property, cached_property, base, def, Named, Mapping, NamedTuple: null,
  named: (given) => new Named(given), keywords: (x) => Object.fromEntries(pairs(x)),
  eq, add, sub, mul, neg, div, floordiv, mod, pow, and, or, or_: or, lt, le, gt, ge, chain, truth, any_of, all_of,
  contains, item, slice, put, remove, iter, pairs, attr, format, repr, len, range, next, zip, isinstance, type: typeOf,
  max: extreme(1), min: extreme(-1), any: listed((items) => items.some(truth)), all: listed((items) => items.every(truth)),
  map: (call, ...lists) => zip(...lists).map((row) => call(...row)),
  filter: listed((call, items) => items.filter((x) => truth(call ? call(x) : x))),
  sum: (items, start = 0n) => [...iter(items)].reduce((a, b) => add(a, b), start),
  enumerate: listed((items) => items.map((x, i) => [BigInt(i), x])), reversed: listed((items) => items.reverse()),
  sorted: listed((items) => items.sort(compare)), divmod: (a, b) => tuple([floordiv(a, b), mod(a, b)]),
  getattr: attr, hasattr: (x, name) => ["object", "function"].includes(typeof x) && x !== null && name in x,
  object: { __setattr__: (x, name, value) => { x[name] = value; } },
  replace, fields: (type) => type.fields.map(({ field, usual }) => ({ name: field, default: usual })),
  reduce: (call, items, ...start) => [...iter(items)].reduce((a, b) => call(a, b), ...start),
  partial: (call, ...first) => (...args) => call(...first, ...args),
  Fraction: (top, bottom = 1n) => new numbers.Fraction(top, bottom), Counter: () => new Counter([]),
  Path: { is: () => false },  // there are no files
  math: {
    prod: listed((items) => items.reduce((a, b) => mul(a, b), 1n)), isfinite: (x) => Number.isFinite(numbers.float(x)),
    ceil: (x) => BigInt(Math.ceil(numbers.float(x))), sqrt: (x) => Math.sqrt(numbers.float(x)),
    log: (x) => Math.log(numbers.float(x)), inf: Infinity,
  },
  jnp: { dtype }, jax: { nn: { silu: null, sigmoid: null } }, wider,
  Exception, ...Object.fromEntries(["ValueError", "TypeError", "NotImplementedError", "KeyError", "IndexError"].map((name) =>
    [name, exception(name, Exception)])),
};
})();
