// Ranks of a run as arrays, and what is drawn of them: heat maps, ranks over time, flow, bars by layer.

const DATA = JSON.parse(document.getElementById("data").textContent);

class Ranks {
  constructor(data) {
    Object.assign(this, data);
    const now = Int32Array.from(data.start);
    this.sites = [now.slice()];
    for (const change of data.changes) {
      for (let i = 0, site = 0; i < change.length; i += 2) { site += change[i]; now[site] += change[i + 1]; }
      this.sites.push(now.slice());
    }
    this.byMatrix = this.sites.map((row) => {
      const sums = new Int32Array(data.names.length);
      for (let s = 0; s < row.length; s++) sums[data.owners[s]] += row[s];
      return sums;
    });
    this.members = data.names.map(() => []);  // matrix -> its sites
    data.owners.forEach((matrix, site) => this.members[matrix].push(site));
    this.hasHeads = data.heads.some((head) => head !== null);
    const stacks = new Set(data.matrices.filter((m) => m[1] !== null).map((m) => m[0]));
    const paths = [...stacks].map((stack) => stack.split(".")), common = paths.length ? paths[0].findIndex((part, i) => paths.some((p) => p[i] !== part)) : 0;
    const short = (stack) => stack.split(".")[Math.max(0, common)] || stack;  // the part that tells the towers apart
    const label = ([stack, layer, kind]) => (stacks.size > 1 && stack ? `${short(stack)}: ${kind}` : kind);
    this.kinds = [...new Set(data.matrices.map(label))];
    this.kindOf = data.matrices.map((m) => this.kinds.indexOf(label(m)));
    this.layers = [...new Set(data.matrices.map((m) => m[1]))].sort((a, b) => (a === null) - (b === null) || a - b);
    this.layerOf = data.matrices.map((m) => this.layers.indexOf(m[1]));
    this.towers = [...new Set(data.matrices.map((m) => m[3] || m[0] || "model"))];
    this.towerOf = data.matrices.map((m) => this.towers.indexOf(m[3] || m[0] || "model"));
    this.most = Math.max(1, ...this.byMatrix.map((row) => row.reduce((a, b) => Math.max(a, b), 0)));
    this.mostOfHead = Math.max(1, ...this.sites.map((row) => row.reduce((a, b) => Math.max(a, b), 0)));
  }
  rowAt(step) { return Math.max(0, lastAt(this.steps, step)); }
  shortKind(index) { const parts = this.kinds[index].split(": "), tail = parts.pop().split(".").pop(); return [...parts, tail].join(": "); }
  matrixName(matrix) { const [stack, layer] = this.matrices[matrix]; return layer === null ? this.names[matrix] : `layer ${layer} ${this.shortKind(this.kindOf[matrix])}`; }
  scoresAt(step) {  // site -> score at the last event that has scores, or null
    const scores = this.scores, at = scores ? lastAt(scores.steps, step) : -1;
    return at < 0 ? null : (site) => scoreOf(scores, scores.rows[at][site]);
  }
}
const scoreOf = (scores, level) => (level === 0 ? 0 : scores.low * (scores.high / scores.low) ** ((level - 1) / (scores.levels - 1)));

const RUNS = DATA.runs.map((run, index) => ({ ...run, index, label: run.name === run.method ? run.name : `${run.name} (${run.method})`, ranks: run.ranks ? new Ranks(run.ranks) : null }));
const WITH_RANKS = RUNS.filter((run) => run.ranks);
for (const key of ["most", "mostOfHead"]) {  // one colour scale for all runs of a kind; sums over heads are larger
  for (const heads of [false, true]) {
    const alike = WITH_RANKS.map((run) => run.ranks).filter((ranks) => ranks.hasHeads === heads), most = Math.max(...alike.map((ranks) => ranks[key]));
    for (const ranks of alike) ranks[key] = most;
  }
}

// ---- what is looked at ----

const state = { step: Infinity, mode: "rank", matrices: "all", order: "kind", group: "kind", site: null };
const changed = [];  // functions that draw what depends on the state
function set(values) { Object.assign(state, values); for (const draw of changed) draw(); keep(); }

// ---- colours ----

const VIRIDIS = [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]];
const LOST = [33, 102, 172], WON = [178, 24, 43];
const mix = (a, b, t) => a.map((v, i) => Math.round(v + (b[i] - v) * t));
const asText = (c) => `rgb(${c[0]},${c[1]},${c[2]})`;
function fromHex(text) { const n = parseInt(text.slice(1), 16); return [n >> 16, (n >> 8) & 255, n & 255]; }
function sequential(t) {
  const at = Math.min(0.99999, Math.max(0, t)) * (VIRIDIS.length - 1), i = Math.floor(at);
  return mix(VIRIDIS[i], VIRIDIS[i + 1], at - i);
}
function diverging(t, neutral) { return t < 0 ? mix(neutral, LOST, Math.min(1, -t)) : mix(neutral, WON, Math.min(1, t)); }
const dark = (c) => 0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2] < 140;
function ramp(from, to, colours) {
  return el("div", { class: "ramp" }, from, el("span", { class: "bar", style: `background:linear-gradient(90deg,${colours.join(",")})` }), to);
}

function canvasIn(host, width, height) {
  const scale = window.devicePixelRatio || 1, canvas = host.querySelector("canvas") || el("canvas", { role: "img" });
  if (!canvas.parentNode) host.replaceChildren(canvas);
  canvas.width = Math.round(width * scale); canvas.height = Math.round(height * scale);
  canvas.style.width = width + "px"; canvas.style.height = height + "px";
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = `11px system-ui, "DejaVu Sans", sans-serif`;
  return [canvas, context];
}

// ---- heat map: layer x matrix, or layer x head of one kind ----

function heatMap(card, run) {
  const ranks = run.ranks, caption = el("h3"), host = el("div", { class: "chart" }), scale = el("div");
  card.append(caption, host, scale);
  if (ranks.layers.length > 24) card.classList.add("span");
  let cells = [];
  function contents() {
    const row = ranks.rowAt(state.step), kind = ranks.kinds.indexOf(state.matrices);
    const scores = state.mode === "score" ? ranks.scoresAt(state.step) : null;
    const columns = ranks.layers.map((layer) => (layer === null ? "-" : String(layer)));
    const out = [];
    const value = (sites) => {
      const sum = (r) => sites.reduce((total, site) => total + ranks.sites[r][site], 0);
      if (state.mode === "score") return scores ? sites.reduce((total, site) => total + scores(site), 0) / sites.length : null;
      return state.mode === "change" ? sum(row) - sum(0) : sum(row);
    };
    if (kind < 0) {
      ranks.names.forEach((name, matrix) => out.push({ row: ranks.kindOf[matrix], column: ranks.layerOf[matrix], sites: ranks.members[matrix], matrix }));
    } else {
      ranks.owners.forEach((matrix, site) => {
        if (ranks.kindOf[matrix] === kind) out.push({ row: ranks.heads[site] ?? 0, column: ranks.layerOf[matrix], sites: [site], matrix });
      });
    }
    for (const cell of out) cell.value = value(cell.sites);
    const rows = kind < 0 ? ranks.kinds.map((_, i) => ranks.shortKind(i))
      : [...Array(Math.max(...out.map((c) => c.row)) + 1).keys()].map((h) => (out.some((c) => ranks.heads[c.sites[0]] !== null) ? `head ${h}` : "matrix"));
    return { rows, columns, out, row, perHead: kind >= 0 };
  }
  function draw() {
    const width = host.clientWidth;
    if (!width) return;
    const { rows, columns, out, row, perHead } = contents();
    const turned = (width - 90) / columns.length < 10 && columns.length > rows.length;  // layers downwards on narrow screens
    const across = turned ? rows : columns, down = turned ? columns : rows;
    const left = turned ? 34 : Math.min(140, 12 + 6.2 * Math.max(...down.map((t) => t.length))), top = turned ? 62 : 16;
    const cw = Math.min(56, Math.max(2, (width - left - 2) / across.length)), ch = turned ? 13 : Math.max(6, Math.min(24, 480 / down.length));
    const height = top + ch * down.length + 2;
    const [canvas, context] = canvasIn(host, width, height);
    const total = ranks.byMatrix[row].reduce((a, b) => a + b, 0);
    caption.textContent = `${run.label}: total rank ${grouped(total)} at step ${ranks.steps[row]}` + (perHead ? `, ${state.matrices} by head` : "");
    canvas.setAttribute("aria-label", `${state.mode} of each matrix, ${caption.textContent}`);
    const numbers = out.map((c) => c.value).filter((v) => v !== null && (state.mode !== "score" || v > 0));
    const high = state.mode === "rank" ? (perHead ? ranks.mostOfHead : ranks.most) : numbers.reduce((m, v) => Math.max(m, Math.abs(v)), state.mode === "score" ? 0 : 1);
    const low = state.mode === "score" ? numbers.reduce((m, v) => Math.min(m, v), Infinity) : 0;
    const neutral = fromHex(css("--neutral")), muted = css("--muted");
    const colour = (v) => state.mode === "rank" ? sequential(v / high) : state.mode === "change" ? diverging(v / high, neutral)
      : v > 0 ? sequential(high > low ? Math.log(v / low) / Math.log(high / low) : 1) : neutral;
    context.textBaseline = "middle";
    cells = out.map((cell) => {
      const x = left + (turned ? cell.row : cell.column) * cw, y = top + (turned ? cell.column : cell.row) * ch;
      const fill = cell.value === null ? neutral : colour(cell.value);
      context.fillStyle = asText(fill);
      const gap = cw > 6 ? 1 : 0;
      context.fillRect(x, y, cw - gap, ch - (ch > 8 ? 1 : 0));
      if (cell.value !== null && state.mode !== "score" && cw >= 19 && ch >= 12) {
        context.fillStyle = dark(fill) ? "#fff" : "#111";
        context.textAlign = "center";
        context.fillText((state.mode === "change" && cell.value > 0 ? "+" : "") + cell.value, x + cw / 2, y + ch / 2 + 0.5);
      }
      if (state.site && cell.sites.some((s) => selects(state.site, ranks, s, cell.matrix))) {
        context.strokeStyle = css("--text"); context.lineWidth = 2;
        context.strokeRect(x + 0.5, y + 0.5, cw - 1.5, ch - 1.5);
      }
      return { ...cell, x, y, w: cw, h: ch };
    });
    context.fillStyle = muted;
    context.textAlign = "right";
    const everyDown = Math.ceil(11 / ch);
    down.forEach((text, i) => { if (i % everyDown === 0) context.fillText(text, left - 5, top + (i + 0.5) * ch, left - 6); });
    const everyAcross = turned ? 1 : Math.max(1, Math.ceil(20 / cw));
    across.forEach((text, i) => {
      if (i % everyAcross) return;
      context.save();
      context.translate(left + (i + 0.5) * cw, top - 5);
      if (turned) { context.rotate(-Math.PI / 3.2); context.textAlign = "left"; } else context.textAlign = "center";
      context.fillText(text, 0, turned ? 0 : -3);
      context.restore();
    });
    const steps = [...Array(9).keys()].map((i) => i / 8);
    scale.replaceChildren(state.mode === "change" ? ramp(`-${high}`, `+${high} since the start`, steps.map((t) => asText(diverging(2 * t - 1, neutral))))
      : state.mode === "rank" ? ramp("rank 0", String(high), steps.map((t) => asText(sequential(t))))
        : numbers.length ? ramp(short(low), `${short(high)} mean score at the last event (logarithmic)`, steps.map((t) => asText(sequential(t))))
          : el("p", { class: "note" }, ranks.scores ? "No event yet at this step." : "This run kept no scores (log_scores)."));
    canvas.onpointermove = (event) => {
      const cell = under(event);
      showTip(event, cell && cellText(cell, ranks, row));
    };
    canvas.onpointerleave = hideTip;
    canvas.onclick = (event) => {
      const cell = under(event);
      if (cell) set({ site: { name: perHead && cell.sites.length === 1 ? siteName(ranks, cell.sites[0]) : ranks.names[cell.matrix] } });
    };
  }
  function under(event) { return cells.find((c) => event.offsetX >= c.x && event.offsetX < c.x + c.w && event.offsetY >= c.y && event.offsetY < c.y + c.h); }
  function cellText(cell, ranks, row) {
    const sum = (r) => cell.sites.reduce((total, site) => total + ranks.sites[r][site], 0);
    const change = sum(row) - sum(0), lines = [cell.sites.length === 1 ? siteName(ranks, cell.sites[0]) : ranks.names[cell.matrix], `rank ${sum(row)} (${change >= 0 ? "+" : ""}${change} since the start)`];
    if (cell.sites.length > 1) lines.push(`${cell.sites.length} heads: ${cell.sites.slice(0, 40).map((s) => ranks.sites[row][s]).join(" ")}`);
    const scores = ranks.scoresAt(state.step);
    if (scores && cell.sites.length === 1) lines.push(`score ${short(scores(cell.sites[0]))}`);
    lines.push("click: its history");
    return lines.join("\n");
  }
  drawn(host, draw);
  changed.push(draw);
}
const siteName = (ranks, site) => ranks.names[ranks.owners[site]] + (ranks.heads[site] === null ? "" : `:head.${ranks.heads[site]}`);
function selects(chosen, ranks, site, matrix) { return chosen.name === ranks.names[matrix] || (chosen.name.includes(":") && chosen.name === siteName(ranks, site)); }

// ---- site x time ----

function timeMap(card, run) {
  const ranks = run.ranks, host = el("div", { class: "chart" }), end = Math.max(run.step, ranks.steps[ranks.steps.length - 1], 1);
  card.append(el("h3", {}, `${run.label}: rank of each matrix over the steps`), host,
    ramp("rank 0", String(ranks.most), [...Array(9).keys()].map((i) => asText(sequential(i / 8)))));
  function draw() {
    const width = host.clientWidth, n = ranks.names.length;
    if (!width) return;
    const left = Math.min(118, width * 0.3), bottom = 20, h = Math.max(1.2, Math.min(9, 520 / n)), height = Math.ceil(n * h) + bottom;
    const order = [...Array(n).keys()];
    const key = state.order === "kind" ? ranks.kindOf : ranks.layerOf, second = state.order === "kind" ? ranks.layerOf : ranks.kindOf;
    order.sort((a, b) => key[a] - key[b] || second[a] - second[b]);
    const [canvas, context] = canvasIn(host, width, height), inner = width - left - 4;
    canvas.setAttribute("aria-label", `rank of each matrix over the steps, ${run.name}`);
    const image = new ImageData(Math.max(1, Math.round(inner)), n);
    for (let x = 0; x < image.width; x++) {
      const row = ranks.byMatrix[ranks.rowAt((x + 0.5) / image.width * end)];
      for (let y = 0; y < n; y++) {
        const c = sequential(row[order[y]] / ranks.most), at = 4 * (y * image.width + x);
        image.data[at] = c[0]; image.data[at + 1] = c[1]; image.data[at + 2] = c[2]; image.data[at + 3] = 255;
      }
    }
    const bitmap = el("canvas", { width: image.width, height: n });
    bitmap.getContext("2d").putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(bitmap, left, 0, inner, n * h);
    context.fillStyle = css("--muted");
    context.textBaseline = "middle";
    context.textAlign = "right";
    let start = 0, lastLabel = -20;
    for (let i = 1; i <= n; i++) {
      if (i < n && key[order[i]] === key[order[start]]) continue;
      const middle = (start + i) / 2 * h, group = key[order[start]];
      const text = state.order === "kind" ? ranks.shortKind(group) : ranks.layers[group] === null ? "-" : `layer ${ranks.layers[group]}`;
      if (middle - lastLabel >= 11) { context.fillText(text, left - 6, Math.max(6, middle), left - 8); lastLabel = middle; }
      if (i < n) { context.fillStyle = css("--card"); context.fillRect(left, i * h - 0.5, inner, Math.min(1, h / 2)); context.fillStyle = css("--muted"); }
      start = i;
    }
    context.textAlign = "center";
    for (const x of ticks(0, end, Math.max(2, Math.floor(width / 100)))) context.fillText(short(x), Math.min(width - 16, left + Math.max(0.01, x / end) * inner), n * h + 11);
    const marked = left + Math.min(1, state.step / end) * inner;
    if (Number.isFinite(state.step)) { context.fillStyle = css("--text"); context.fillRect(marked - 0.75, 0, 1.5, n * h); }
    const under = (event) => {
      const y = Math.floor(event.offsetY / h), x = (event.offsetX - left) / inner;
      return y < 0 || y >= n || x < 0 || x > 1 ? null : { matrix: order[y], step: x * end };
    };
    canvas.onpointermove = (event) => {
      const at = under(event);
      showTip(event, at && `${ranks.names[at.matrix]}\nstep ${Math.round(at.step)}: rank ${ranks.byMatrix[ranks.rowAt(at.step)][at.matrix]}\nclick: its history`);
    };
    canvas.onpointerleave = hideTip;
    canvas.onclick = (event) => { const at = under(event); if (at) set({ site: { name: ranks.names[at.matrix] } }); };
  }
  drawn(host, draw);
  changed.push(draw);
}

// ---- flow between groups ----

function groups(ranks) {
  if (state.group === "tower") return { names: ranks.towers, of: ranks.towerOf };
  if (state.group === "layer") {
    const size = Math.ceil(ranks.layers.length / 10), count = Math.ceil(ranks.layers.length / size);
    const name = (i) => { const a = ranks.layers[i * size], b = ranks.layers[Math.min(ranks.layers.length, (i + 1) * size) - 1]; return a === b || b === null ? `layer ${a ?? "-"}` : `layers ${a}-${b}`; };
    return { names: [...Array(count).keys()].map(name), of: ranks.layerOf.map((l) => Math.floor(l / size)) };
  }
  return { names: ranks.kinds.map((_, i) => ranks.shortKind(i)), of: ranks.kindOf };
}
function groupTotals(ranks, row, of, count) {
  const sums = new Array(count).fill(0);
  ranks.byMatrix[row].forEach((rank, matrix) => { sums[of[matrix]] += rank; });
  return sums;
}

function flowMap(card, run) {
  const ranks = run.ranks, caption = el("h3"), host = el("div", { class: "chart" });
  card.append(caption, host);
  function draw() {
    const width = host.clientWidth;
    if (!width) return;
    const { names, of } = groups(ranks), row = ranks.rowAt(state.step), count = names.length;
    const before = groupTotals(ranks, 0, of, count), after = groupTotals(ranks, row, of, count);
    caption.textContent = `${run.label}: from the start to step ${ranks.steps[row]}`;
    const lost = before.map((b, i) => Math.max(0, b - after[i])), won = before.map((b, i) => Math.max(0, after[i] - b));
    const allLost = lost.reduce((a, b) => a + b, 0), allWon = won.reduce((a, b) => a + b, 0), moved = Math.min(allLost, allWon);
    const ends = { removed: allLost - moved, added: allWon - moved };
    const leftBars = [...before.map((size, i) => ({ size, name: names[i], colour: kindColour(i) })), ...(ends.added ? [{ size: ends.added, name: "added", colour: css("--muted") }] : [])];
    const rightBars = [...after.map((size, i) => ({ size, name: names[i], colour: kindColour(i) })), ...(ends.removed ? [{ size: ends.removed, name: "removed", colour: css("--muted") }] : [])];
    const total = leftBars.reduce((a, b) => a + b.size, 0) || 1, gap = 5, height = Math.max(200, 26 * Math.max(leftBars.length, rightBars.length));
    const label = Math.min(190, width * 0.3), bar = 11, scale = (height - gap * Math.max(leftBars.length, rightBars.length)) / total;
    const svg = svgEl("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": caption.textContent });
    const x0 = label + bar, x1 = width - label - bar;
    const place = (bars) => { let y = gap / 2; for (const b of bars) { b.y = y; b.used = 0; b.h = b.size * scale; y += b.h + gap; } };
    place(leftBars); place(rightBars);
    const ribbon = (from, to, size, colour, strong, text) => {
      if (size <= 0) return;
      const h = size * scale, a = from.y + from.used, b = to.y + to.used, m = (x0 + x1) / 2;
      from.used += h; to.used += h;
      const path = svgEl("path", { d: `M${x0} ${a}C${m} ${a} ${m} ${b} ${x1} ${b}V${b + h}C${m} ${b + h} ${m} ${a + h} ${x0} ${a + h}Z`, fill: colour, opacity: strong ? 0.6 : 0.16 });
      path.addEventListener("pointermove", (event) => showTip(event, text));
      path.addEventListener("pointerleave", hideTip);
      svg.append(path);
    };
    names.forEach((name, i) => ribbon(leftBars[i], rightBars[i], Math.min(before[i], after[i]), kindColour(i), false, `${name}: ${Math.min(before[i], after[i])} stayed`));
    const givers = [...lost.map((size, i) => ({ size, bar: leftBars[i] })), ...(ends.added ? [{ size: ends.added, bar: leftBars[count] }] : [])];
    const takers = [...won.map((size, i) => ({ size, bar: rightBars[i] })), ...(ends.removed ? [{ size: ends.removed, bar: rightBars[count] }] : [])];
    const flow = Math.max(allLost, allWon) || 1;
    for (const giver of givers) for (const taker of takers) {
      const outside = giver.bar.name === "added" && taker.bar.name === "removed";
      if (!outside) ribbon(giver.bar, taker.bar, giver.size * taker.size / flow, giver.bar.colour, true, `${giver.bar.name} to ${taker.bar.name}: ${short(giver.size * taker.size / flow)}`);
    }
    for (const [bars, x, anchor] of [[leftBars, label, "end"], [rightBars, width - label - bar, "start"]]) {
      let line = -Infinity;  // labels of thin bars move down, so that none covers another
      for (const b of bars) {
        line = Math.max(b.y + Math.max(1, b.h) / 2 + 4, line + 11.5);
        svg.append(svgEl("rect", { x, y: b.y, width: bar, height: Math.max(1, b.h), fill: b.colour }));
        const text = svgEl("text", { x: anchor === "end" ? x - 5 : x + bar + 5, y: line, "text-anchor": anchor });
        const most = Math.floor((label - 34) / 5.8);
        text.textContent = `${b.name.length > most ? b.name.slice(0, most - 1) + "\u2026" : b.name} ${b.size}`;
        svg.append(text);
      }
    }
    host.replaceChildren(svg);
  }
  drawn(host, draw);
  changed.push(draw);
  changed.push(lineChart(card, "Total rank of each group over the steps", () => {
    const { names, of } = groups(ranks), totals = ranks.steps.map((_, row) => groupTotals(ranks, row, of, names.length));
    const end = Math.max(run.step, ranks.steps[ranks.steps.length - 1]);
    return { series: names.map((name, i) => ({ name, colour: kindColour(i), step: true, x: [...ranks.steps, end], y: [...totals.map((t) => t[i]), totals[totals.length - 1][i]] })) };
  }));
}

// ---- rank by layer ----

function layerBars(card, run) {
  const ranks = run.ranks, caption = el("h3"), legend = el("div", { class: "legend" }), host = el("div", { class: "chart" });
  card.append(caption, legend, host);
  legend.append(...ranks.kinds.map((_, i) => el("span", {}, el("i", { style: `background:${kindColour(i)}` }), ranks.shortKind(i))));
  function draw() {
    const width = host.clientWidth, height = 220, left = 44, bottom = 22, top = 6;
    if (!width) return;
    const row = ranks.rowAt(state.step), n = ranks.layers.length;
    caption.textContent = `${run.label}: at step ${ranks.steps[row]}`;
    const table = ranks.layers.map(() => new Array(ranks.kinds.length).fill(0));
    ranks.byMatrix[row].forEach((rank, matrix) => { table[ranks.layerOf[matrix]][ranks.kindOf[matrix]] += rank; });
    const most = Math.max(1, ...table.map((t) => t.reduce((a, b) => a + b, 0)));
    const svg = svgEl("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `rank by layer, ${caption.textContent}` });
    const inner = height - top - bottom, w = (width - left - 6) / n;
    for (const y of ticks(0, most, 4)) {
      const at = top + inner * (1 - y / most);
      svg.append(svgEl("line", { x1: left, x2: width - 6, y1: at, y2: at, stroke: "var(--grid)" }), svgEl("text", { x: left - 6, y: at + 4, "text-anchor": "end" }, short(y)));
    }
    table.forEach((parts, i) => {
      let y = top + inner;
      const bar = svgEl("g");
      parts.forEach((rank, kind) => {
        const h = rank / most * inner;
        y -= h;
        if (rank) bar.append(svgEl("rect", { x: left + i * w + w * 0.08, y, width: Math.max(1, w * 0.84), height: h, fill: kindColour(kind) }));
      });
      const name = ranks.layers[i] === null ? "outside the layers" : `layer ${ranks.layers[i]}`;
      bar.addEventListener("pointermove", (event) => showTip(event, [`${name}: ${parts.reduce((a, b) => a + b, 0)}`, ...parts.map((rank, kind) => (rank ? `${ranks.shortKind(kind)} ${rank}` : "")).filter(Boolean)].join("\n")));
      bar.addEventListener("pointerleave", hideTip);
      svg.append(bar);
      if (i % Math.max(1, Math.ceil(24 / w)) === 0) svg.append(svgEl("text", { x: left + (i + 0.5) * w, y: height - 6, "text-anchor": "middle" }, ranks.layers[i] === null ? "-" : String(ranks.layers[i])));
    });
    host.replaceChildren(svg);
  }
  drawn(host, draw);
  changed.push(draw);
}
