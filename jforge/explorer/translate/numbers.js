"use strict";
/* Python's numbers: an int is a BigInt (true and false count as 1 and 0), a float a number, a Fraction a Fraction. Ints
   stay exact, an int meets a float as a float, a Fraction makes an int a Fraction. What is asked of anything else throws
   a RangeError. */
const numbers = (() => {
const gcd = (a, b) => { while (b) [a, b] = [b, a % b]; return a < 0n ? -a : a; };
class Fraction {
  constructor(top, bottom = 1n) {
    const common = gcd(top, bottom) || 1n;
    [this.top, this.bottom] = [top / common, bottom / common];
  }
}
const isInt = (x) => typeof x === "bigint" || typeof x === "boolean";
const isNumber = (x) => isInt(x) || typeof x === "number" || x instanceof Fraction;
const float = (x) => (x instanceof Fraction ? Number(x.top) / Number(x.bottom) : Number(x));
const asFraction = (x) => (x instanceof Fraction ? x : new Fraction(BigInt(x)));

function int(x) {
  if (x instanceof Fraction) return x.top / x.bottom;
  if (typeof x === "number" && !Number.isFinite(x)) throw new RangeError(`${floatText(x)} is no whole number`);
  if (!isNumber(x)) throw new RangeError("this is no number");
  return BigInt(typeof x === "number" ? Math.trunc(x) : x);
}

/* An operation on two numbers of any kind, from what it is of two BigInts, numbers or Fractions. */
const operation = (name, ofInts, ofFloats, ofFractions) => (a, b) => {
  if (!isNumber(a) || !isNumber(b)) throw new RangeError(`there is no ${name} of these two`);
  if (isInt(a) && isInt(b)) return ofInts(BigInt(a), BigInt(b));
  if (typeof a === "number" || typeof b === "number") return ofFloats(float(a), float(b));
  if (!ofFractions) throw new RangeError(`there is no ${name} of fractions`);
  return ofFractions(asFraction(a), asFraction(b));
};
const floor = (a, b) => { const q = a / b; return a % b && (a < 0n) !== (b < 0n) ? q - 1n : q; };
const nonzero = (operate) => (a, b) => {
  if (isNumber(b) && float(b) === 0) throw new RangeError("division by zero");
  return operate(a, b);
};
const add = operation("sum", (a, b) => a + b, (a, b) => a + b,
  (a, b) => new Fraction(a.top * b.bottom + b.top * a.bottom, a.bottom * b.bottom));
const mul = operation("product", (a, b) => a * b, (a, b) => a * b,
  (a, b) => new Fraction(a.top * b.top, a.bottom * b.bottom));
const sub = (a, b) => add(a, mul(b, -1n));
const div = nonzero(operation("quotient", (a, b) => Number(a) / Number(b), (a, b) => a / b,
  (a, b) => new Fraction(a.top * b.bottom, a.bottom * b.top)));
const floordiv = nonzero(operation("quotient", floor, (a, b) => Math.floor(a / b)));
const mod = nonzero(operation("rest", (a, b) => a - floor(a, b) * b, (a, b) => a - Math.floor(a / b) * b));
const pow = operation("power", (a, b) => (b < 0n ? Number(a) ** Number(b) : a ** b), (a, b) => a ** b);
const and = operation("common bits", (a, b) => a & b, () => { throw new RangeError("floats have no bits here"); });
const or = operation("joined bits", (a, b) => a | b, () => { throw new RangeError("floats have no bits here"); });
/* Negative, 0 or positive as a is less than, equal to or greater than b; NaN where there is no order. */
const compare = operation("order", order, order, (a, b) => order(a.top * b.bottom, b.top * a.bottom));
function order(a, b) { return a < b ? -1 : a > b ? 1 : a === b ? 0 : NaN; }
/* Text that equal numbers share, of whatever kind. */
const key = (x) => (x instanceof Fraction && x.bottom !== 1n ? `${x.top}/${x.bottom}`
  : `${typeof x === "number" && !Number.isInteger(x) ? x : int(x)}`);

function floatText(x) {
  if (!Number.isFinite(x)) return Number.isNaN(x) ? "nan" : x < 0 ? "-inf" : "inf";
  const size = Math.abs(x);
  if (x && (size < 1e-4 || size >= 1e16)) return exponent(x.toExponential());
  return Number.isInteger(x) ? `${Object.is(x, -0) ? "-0" : x}.0` : `${x}`;
}
const exponent = (text) => text.replace(/e([+-])(\d)$/, "e$10$2");

/* By a format of Python: "," for thousands, ".2f" for decimals, or both; "g" and ".3g" for that many digits. */
function format(x, how) {
  const [, comma, decimals, digits] = /^(,?)(?:\.(\d)f)?(?:(?:\.(\d+))?g)?$/.exec(how) ?? [];
  if (comma === undefined) throw new RangeError(`${how} is no format that is known here`);
  if (how.endsWith("g")) return general(float(x), Number(digits ?? 6));
  const text = decimals === undefined ? `${int(x)}` : rounded(x, Number(decimals));
  return comma ? text.replace(/^-?\d+/, (whole) => whole.replace(/\B(?=(\d{3})+$)/g, ",")) : text;
}
function general(x, digits) {
  const text = x.toExponential(digits - 1), power = Number(text.split("e")[1]);
  const short = (t) => (t.includes(".") ? t.replace(/\.?0+(?=e|$)/, "") : t);
  return power < -4 || power >= digits ? exponent(short(text)) : short(x.toFixed(digits - 1 - power));
}
/* A number from 0 on with so many decimals; halves of its exact value go to the even digit. */
function rounded(x, decimals) {
  const { top, bottom } = exactly(x), scaled = top * 10n ** BigInt(decimals);
  const whole = scaled / bottom, rest = 2n * (scaled % bottom);
  const digits = `${whole + (rest > bottom || (rest === bottom && whole % 2n) ? 1n : 0n)}`.padStart(decimals + 1, "0");
  return decimals ? `${digits.slice(0, -decimals)}.${digits.slice(-decimals)}` : digits;
}
/* A float is a whole number of some power of two. */
function exactly(x) {
  if (typeof x !== "number") return asFraction(x);
  let bottom = 1n;
  while (!Number.isInteger(x)) { x *= 2; bottom *= 2n; }
  return new Fraction(BigInt(x), bottom);
}
return { Fraction, isInt, isNumber, float, int, add, sub, mul, div, floordiv, mod, pow, and, or, compare, key, floatText, format };
})();
