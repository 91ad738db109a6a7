// Elements, numbers and line charts. Everything below is drawn again when the width or the theme changes.

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function svgEl(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

const KINDS = ["#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#b07aa1", "#d4a72c", "#9c755f", "#ff9da7",
  "#6b9e3b", "#d37295", "#8cb8dd"];
const runColour = (index) => css(`--c${index % 8}`);
const kindColour = (index) => KINDS[index % KINDS.length];

function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "";
  const size = Math.abs(value);
  if (size >= 1e12) return (value / 1e12).toPrecision(3) + "T";
  if (size >= 1e9) return (value / 1e9).toPrecision(3) + "G";
  if (size >= 1e6) return (value / 1e6).toPrecision(3) + "M";
  if (size >= 1e4) return (value / 1e3).toPrecision(3) + "k";
  if (size !== 0 && size < 1e-3) return value.toExponential(1);
  return String(+value.toPrecision(4));
}
const gib = (value) => (value ? (value / 2 ** 30).toPrecision(3) + " GiB" : "");
const grouped = (value) => (value === null || value === undefined ? "" : Math.round(value).toLocaleString("en"));

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "";
  const rest = Math.max(0, Math.round(seconds)), h = Math.floor(rest / 3600), m = Math.floor(rest / 60) % 60;
  const two = (n) => String(n).padStart(2, "0");
  return h ? `${h}:${two(m)}:${two(rest % 60)}` : `${m}:${two(rest % 60)}`;
}

// ---- drawn again and again ----

const drawings = [];
function drawn(host, draw) {
  if (host.clientWidth) draw();
  let width = host.clientWidth;
  drawings.push(draw);
  new ResizeObserver(() => {
    if (Math.abs(host.clientWidth - width) <= 1) return;
    width = host.clientWidth;
    requestAnimationFrame(draw);  // drawing inside the observer would be told to it at once
  }).observe(host);
}
function drawAll() { for (const draw of drawings) draw(); }

const tip = document.getElementById("tip");
function showTip(event, text) {
  if (!text) { tip.hidden = true; return; }
  tip.textContent = text;
  tip.hidden = false;
  const wide = document.documentElement.clientWidth, box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(event.pageX + 14, wide - box.width - 6 + window.scrollX)) + "px";
  tip.style.top = event.pageY + 16 + "px";
}
const hideTip = () => { tip.hidden = true; };

// ---- scales ----

function ticks(low, high, count) {
  const span = high - low || 1, rough = span / Math.max(1, count), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((s) => s >= rough);
  const out = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) out.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return out;
}

function lastAt(xs, x) {  // the last index with xs[i] <= x; -1 before the first
  let low = 0, high = xs.length;
  while (low < high) { const middle = (low + high) >> 1; if (xs[middle] <= x) low = middle + 1; else high = middle; }
  return low - 1;
}

// ---- line charts ----
// spec(): {series: [{name, colour, x, y, step, dash, faint, dots}], log, zero, format, marks: [{x, text}]}; null: nothing

function lineChart(card, title, spec, { height = 190, note = "" } = {}) {
  const legend = el("div", { class: "legend" }), host = el("div", { class: "chart" });
  card.append(el("h3", {}, title), legend, host);
  if (note) card.append(el("p", { class: "note" }, note));
  function draw() {
    const { series: all, log = false, zero = false, format = short, marks = [] } = spec();
    const series = all.filter((s) => s.x.length);
    legend.replaceChildren(...(series.length > 1 ? series.filter((s) => s.name) : []).map((s) =>
      el("span", {}, el("i", { style: `background:${s.colour};opacity:${s.faint ? 0.4 : 1}` }), s.name)));
    const width = host.clientWidth, left = 52, right = 12, top = 6, bottom = 22;
    if (!width) return;
    const svg = svgEl("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
    svg.append(svgEl("title", {}));
    svg.firstChild.textContent = title;
    host.replaceChildren(svg);
    const usable = (v) => Number.isFinite(v) && (!log || v > 0);
    let x0 = Infinity, x1 = -Infinity, y0 = zero ? 0 : Infinity, y1 = -Infinity;
    for (const s of series) {
      for (const x of s.x) { if (x < x0) x0 = x; if (x > x1) x1 = x; }
      for (const y of s.y) if (usable(y)) { if (y < y0) y0 = y; if (y > y1) y1 = y; }
    }
    if (y1 === -Infinity) {
      svg.append(svgEl("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing yet"));
      return;
    }
    if (x1 === x0) x1 = x0 + 1;
    if (y1 === y0) { const pad = Math.abs(y1) * 0.1 || 1; if (log) { y0 /= 2; y1 *= 2; } else { y0 -= zero ? 0 : pad; y1 += pad; } }
    else if (!log) { const pad = (y1 - y0) * 0.05; y1 += pad; if (!zero) y0 -= pad; }
    const tx = (x) => left + (x - x0) / (x1 - x0) * (width - left - right);
    const inner = height - top - bottom;
    const ty = log ? (y) => top + inner * (1 - Math.log(y / y0) / Math.log(y1 / y0)) : (y) => top + inner * (1 - (y - y0) / (y1 - y0));
    const levels = log ? ticks(Math.log10(y0), Math.log10(y1), 4).map((e) => 10 ** e) : ticks(y0, y1, 4);
    for (const y of levels) {
      svg.append(svgEl("line", { x1: left, x2: width - right, y1: ty(y), y2: ty(y), stroke: "var(--grid)" }));
      svg.append(svgEl("text", { x: left - 6, y: ty(y) + 4, "text-anchor": "end" }, format(y)));
    }
    for (const x of ticks(x0, x1, Math.max(2, Math.floor(width / 90)))) {
      svg.append(svgEl("text", { x: tx(x), y: height - 6, "text-anchor": tx(x) > width - 24 ? "end" : "middle" }, short(x)));
    }
    svg.append(svgEl("line", { x1: left, x2: width - right, y1: height - bottom, y2: height - bottom, stroke: "var(--line)" }));
    for (const mark of marks) {
      svg.append(svgEl("line", { x1: tx(mark.x), x2: tx(mark.x), y1: top, y2: height - bottom, stroke: "var(--muted)", "stroke-dasharray": "2 3" }));
    }
    for (const s of series) {
      let path = "", before = null;
      for (let i = 0; i < s.x.length; i++) {
        if (!usable(s.y[i])) { before = null; continue; }
        const x = tx(s.x[i]).toFixed(1), y = ty(s.y[i]).toFixed(1);
        path += before === null ? `M${x} ${y}` : s.step ? `H${x}V${y}` : `L${x} ${y}`;
        before = i;
      }
      svg.append(svgEl("path", { d: path, fill: "none", stroke: s.colour, "stroke-width": s.faint ? 1.1 : 1.8, opacity: s.faint ? 0.5 : 1,
        "stroke-linejoin": "round", ...(s.dash ? { "stroke-dasharray": s.dash } : {}) }));
      if (s.dots && s.x.length <= 60) for (let i = 0; i < s.x.length; i++) {
        if (usable(s.y[i])) svg.append(svgEl("circle", { cx: tx(s.x[i]), cy: ty(s.y[i]), r: 2.6, fill: s.colour }));
      }
    }
    const cursor = svgEl("line", { y1: top, y2: height - bottom, stroke: "var(--muted)", opacity: 0 });
    svg.append(cursor);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = x0 + (event.clientX - box.left - left) / (width - left - right) * (x1 - x0);
      if (x < x0 || x > x1) { hideTip(); cursor.setAttribute("opacity", 0); return; }
      cursor.setAttribute("x1", tx(x)); cursor.setAttribute("x2", tx(x)); cursor.setAttribute("opacity", 0.7);
      const lines = [`step ${Math.round(x)}`];
      for (const s of series.slice(0, 14)) {
        const at = lastAt(s.x, x);
        if (at >= 0 && Number.isFinite(s.y[at])) lines.push(`${s.name || title}: ${format(s.y[at])}` + (s.step || s.dash ? "" : ` (step ${s.x[at]})`));
      }
      for (const mark of marks) if (Math.abs(tx(mark.x) - tx(x)) < 5) lines.push(mark.text);
      showTip(event, lines.join("\n"));
    });
    svg.addEventListener("pointerleave", () => { hideTip(); cursor.setAttribute("opacity", 0); });
  }
  drawn(host, draw);
  return draw;
}
