// The page: sections one after another, each from the runs' numbers.

const at = (id) => document.getElementById(id);
const cards = (id) => (title) => { const card = el("div", { class: "card" }); if (title) card.append(el("h3", {}, title)); at(id).append(card); return card; };

// ---- what stays over a reload: theme, step and choices ----

function stored(name, value) {
  try {  // a browser may keep nothing for files from disk
    if (value === undefined) return JSON.parse(sessionStorage.getItem(name));
    sessionStorage.setItem(name, JSON.stringify(value));
  } catch (error) { /* then it starts anew */ }
  return null;
}
function keep() { stored("ardtrain-view", { ...state, step: Number.isFinite(state.step) ? state.step : null }); }

const theme = stored("ardtrain-theme");
if (theme) document.documentElement.dataset.theme = theme;
at("theme").addEventListener("click", () => {
  const given = document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  document.documentElement.dataset.theme = given === "dark" ? "light" : "dark";
  stored("ardtrain-theme", document.documentElement.dataset.theme);
  drawAll();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

// ---- overview ----

function overview() {
  const card = el("div", { class: "card scroll all" });
  const last = (run, name) => { const c = run.curves[name]; return c && c[1].length ? c[1][c[1].length - 1] : null; };
  const first = (run) => (run.ranks ? run.ranks.totals[1][0] : null), final = (run) => (run.ranks ? run.ranks.totals[1][run.ranks.totals[1].length - 1] : null);
  const rows = [
    ["method", (r) => r.method],
    ["state", (r) => r.state + (r.alive ? ", going on" : "") + (r.secondsLeft ? `, about ${duration(r.secondsLeft)} left` : "")],
    ["step", (r) => `${grouped(r.step)}${r.numSteps ? " of " + grouped(r.numSteps) : ""}`],
    ["training loss", (r) => short(last(r, "loss"))],
    ["held-out loss", (r) => (r.lastEval === null ? "" : `${r.lastEval.toFixed(4)} (best ${r.bestLoss.toFixed(4)})`)],
    ["total rank", (r) => (r.ranks ? `${grouped(first(r))} to ${grouped(final(r))}` : "")],
    ["matrices, sites", (r) => (r.ranks ? `${grouped(r.ranks.names.length)}, ${grouped(r.ranks.owners.length)}` : "")],
    ["events of the allocator", (r) => (r.ranks ? grouped(r.ranks.numEvents) : "")],
    ["trained numbers at the start", (r) => (r.trained ? `${grouped(r.trained)} (${(100 * r.trained / (r.base || 1)).toPrecision(2)} % of the base)` : "")],
    ["in components, now", (r) => (r.ranks && r.ranks.parameters[1].length ? grouped(r.ranks.parameters[1][r.ranks.parameters[1].length - 1]) : "")],
    ["tokens/s", (r) => short(last(r, "tokens_per_second"))],
    ["time", (r) => (r.elapsed ? duration(r.elapsed) : "")],
    ["peak memory of process 0", (r) => [gib(last(r, "device_memory_peak_bytes")) && gib(last(r, "device_memory_peak_bytes")) + " device", gib(last(r, "host_memory_peak_bytes")) && gib(last(r, "host_memory_peak_bytes")) + " host"].filter(Boolean).join(", ")],
    ["processes", (r) => [r.worldSize ?? "", r.device].filter(Boolean).join(" on ")],
    ["starts", (r) => (r.starts.length > 1 ? `${r.starts.length}, resumed at step ${r.starts.slice(1).join(", ")}` : "")],
    ["steps without an update", (r) => (r.numVoid ? `${r.numVoid}: not finite at ${r.voidSteps.slice(0, 8).join(", ")}` : "")],
  ];
  const shown = rows.map(([name, of]) => [name, RUNS.map(of)]).filter(([, values]) => values.some((v) => v !== ""));
  card.append(el("table", {},
    el("thead", {}, el("tr", {}, el("th"), ...RUNS.map((run) => el("th", {}, el("span", { class: "dot", style: `background:var(--c${run.index % 8})` }), run.name)))),
    el("tbody", {}, ...shown.map(([name, values]) => el("tr", {}, el("th", { scope: "row" }, name), ...values.map((v) => el("td", {}, String(v))))))));
  at("overview").append(card);
  for (const run of RUNS.filter((r) => r.error)) at("overview").append(el("p", { class: "bad" }, `${run.name} failed: ${run.error.split("\n").pop()}`));
}

// ---- curves ----

function curves() {
  const card = cards("curve-cards");
  const has = (name) => RUNS.some((run) => run.curves[name] && run.curves[name][0].length);
  const label = (run, text) => (RUNS.length > 1 ? (text ? `${run.name}, ${text}` : run.name) : text || run.name);
  const marks = () => RUNS.flatMap((run) => run.starts.slice(1).map((step) => ({ x: step, text: `${run.name}: resumed after step ${step}` })));
  const simple = (name, options = {}) => () => ({ ...options, marks: marks(), series: RUNS.filter((r) => r.curves[name]).map((run) => ({ name: label(run), colour: runColour(run.index), x: run.curves[name][0], y: run.curves[name][1] })) });
  const inGib = (name) => () => { const spec = simple(name, { zero: true })(); for (const s of spec.series) s.y = s.y.map((v) => v / 2 ** 30); return spec; };
  if (has("loss")) lineChart(card(), has("eval_loss") ? "Loss (thin: training, thick: held-out)" : "Training loss", () => ({ marks: marks(), series: RUNS.flatMap((run) => [
    ...(run.curves.loss ? [{ name: label(run, "training"), colour: runColour(run.index), faint: has("eval_loss"), x: run.curves.loss[0], y: run.curves.loss[1] }] : []),
    ...(run.curves.eval_loss ? [{ name: label(run, "held-out"), colour: runColour(run.index), dots: true, x: run.curves.eval_loss[0], y: run.curves.eval_loss[1] }] : [])]) }), { height: 230 });
  if (has("eval_loss")) lineChart(card(), "Held-out loss", () => { const spec = simple("eval_loss")(); spec.series.forEach((s) => { s.dots = true; }); return spec; }, { height: 230 });
  const toEnd = (run, [x, y]) => (x.length ? { x: [...x, Math.max(run.step, x[x.length - 1])], y: [...y, y[y.length - 1]] } : { x, y });
  const against = (key, budget, what) => () => ({ zero: true, marks: marks(), series: WITH_RANKS.flatMap((run) => {
    const line = toEnd(run, run.ranks[key]);
    const limit = run.ranks[budget];
    return [{ name: label(run, what), colour: runColour(run.index), step: true, ...line },
      ...(limit !== null && line.x.length ? [{ name: label(run, "budget"), colour: runColour(run.index), dash: "5 4", faint: true, x: [line.x[0], line.x[line.x.length - 1]], y: [limit, limit] }] : [])];
  }) });
  if (WITH_RANKS.length) lineChart(card(), "Total rank against the budget", against("totals", "budget", "total rank"));
  if (WITH_RANKS.some((run) => run.ranks.parameters[0].length)) lineChart(card(), "Numbers in components against the budget", against("parameters", "budgetParameters", "numbers"), { note: "A component of a matrix holds in + out numbers. The budget is the method's target, or what the run started with." });
  if (has("learning_rate")) lineChart(card(), "Learning rate", simple("learning_rate", { zero: true }));
  if (has("tokens_per_second")) lineChart(card(), "Tokens per second", simple("tokens_per_second", { zero: true }));
  if (has("grad_norm")) lineChart(card(), "Gradient norm before clipping", simple("grad_norm", { zero: true }));
  if (has("device_memory_peak_bytes")) lineChart(card(), "Peak memory of process 0's device, GiB", inGib("device_memory_peak_bytes"));
  if (has("host_memory_peak_bytes")) lineChart(card(), "Peak memory of process 0 on the host, GiB", inGib("host_memory_peak_bytes"));
}

// ---- ranks: controls, maps, one site ----

function choice(name, label, options) {
  const select = el("select", { on: { change: (event) => set({ [name]: event.target.value }) } }, ...options.map(([value, text]) => el("option", { value }, text)));
  select.value = options.some(([value]) => value === state[name]) ? state[name] : options[0][0];
  state[name] = select.value;
  return el("label", {}, label, select);
}

function rankSections() {
  const steps = [...new Set(WITH_RANKS.flatMap((run) => [...run.ranks.steps, run.step]))].sort((a, b) => a - b), end = steps.length - 1;
  const shown = el("output"), range = el("input", { type: "range", min: 0, max: end, value: end, id: "step", "aria-label": "step" });
  range.addEventListener("input", () => set({ step: steps[range.value] }));
  changed.push(() => {
    const where = Number.isFinite(state.step) ? Math.max(0, lastAt(steps, state.step)) : end;
    range.value = where;
    shown.textContent = `step ${steps[where]}`;
  });
  const kinds = [...new Set(WITH_RANKS.filter((run) => run.ranks.hasHeads).flatMap((run) => run.ranks.kinds))];
  const names = [...new Set(WITH_RANKS.flatMap((run) => run.ranks.names))];
  const finder = el("input", { list: "sites", placeholder: "a matrix", size: 24, "aria-label": "matrix", on: { change: (event) => { if (names.includes(event.target.value)) set({ site: { name: event.target.value } }); } } });
  at("rank-controls").append(
    el("label", { class: "slider" }, "Step", range, shown),
    choice("mode", "Show", [["rank", "rank"], ["change", "change since the start"], ["score", "score"]]),
    ...(kinds.length ? [choice("matrices", "Heads of", [["all", "all, summed by matrix"], ...kinds.map((k) => [k, k])])] : []),
    el("label", {}, "Find", finder, el("datalist", { id: "sites" }, ...names.slice(0, 3000).map((name) => el("option", { value: name })))));
  for (const run of WITH_RANKS) heatMap(cards("map-cards")(), run);
  siteCard();
  at("time-controls").append(choice("order", "Order", [["kind", "by matrix, layers within"], ["layer", "by layer, matrices within"]]));
  for (const run of WITH_RANKS) timeMap(cards("time-cards")(), run);
  const options = [["kind", "matrices"], ["layer", "layers"]];
  if (WITH_RANKS.some((run) => run.ranks.towers.length > 1)) options.push(["tower", "towers"]);
  at("flow-controls").append(choice("group", "Between", options), el("span", { class: "note" },
    "Strong ribbons moved, faint ones stayed. No allocator pairs a component that goes with one that comes: what groups lost is shared out over what others won."));
  for (const run of WITH_RANKS) flowMap(cards("flow-cards")(), run);
  for (const run of WITH_RANKS) layerBars(cards("layer-cards")(), run);
  for (const run of WITH_RANKS) decisions(run);
}

function siteCard() {
  const card = cards("map-cards")();
  card.id = "site";
  if (WITH_RANKS.length > 1) card.classList.add("span");
  changed.push(() => {
    if (!state.site) { card.replaceChildren(el("p", { class: "note" }, "Click a cell, or find a matrix by name, to see its history.")); return; }
    if (card.dataset.site === state.site.name) return;
    card.dataset.site = state.site.name;
    drawings.splice(0, drawings.length, ...drawings.filter((d) => !d.ofSite));
    const before = drawings.length;
    const name = state.site.name, matrixName = name.split(":")[0], perHead = name.includes(":");
    const found = WITH_RANKS.map((run) => ({ run, matrix: run.ranks.names.indexOf(matrixName) })).filter(({ matrix }) => matrix >= 0)
      .map(({ run, matrix }) => ({ run, matrix, sites: run.ranks.members[matrix].filter((s) => !perHead || siteName(run.ranks, s) === name) })).filter(({ sites }) => sites.length);
    const grid = el("div", { class: "cards" }), first = el("div"), second = el("div");
    grid.append(first, second);
    card.replaceChildren(el("h3", {}, `History of ${name}`), grid);
    const label = (run, text) => (WITH_RANKS.length > 1 ? `${run.name} ${text}` : text);
    lineChart(first, "Rank", () => ({ zero: true, series: found.flatMap(({ run, sites }) => {
      const ranks = run.ranks, x = [...ranks.steps, Math.max(run.step, ranks.steps[ranks.steps.length - 1])], of = (list) => { const y = ranks.sites.map((row) => list.reduce((t, s) => t + row[s], 0)); return [...y, y[y.length - 1]]; };
      const heads = sites.length > 1 && sites.length <= 64 ? sites.map((s) => ({ name: "", colour: runColour(run.index), faint: true, step: true, x, y: of([s]) })) : [];
      return [{ name: label(run, sites.length > 1 ? "all heads" : "rank"), colour: runColour(run.index), step: true, x, y: of(sites) }, ...heads];
    }) }));
    if (found.some(({ run }) => run.ranks.scores)) lineChart(second, "Mean score before each event (logarithmic" + (new Set(found.map(({ run }) => run.method)).size > 1 ? "; each method has a scale of its own)" : ")"), () => ({ log: true, series: found.filter(({ run }) => run.ranks.scores).map(({ run, sites }) => {
      const scores = run.ranks.scores;
      return { name: label(run, "score"), colour: runColour(run.index), x: scores.steps, y: scores.rows.map((row) => sites.reduce((t, s) => t + scoreOf(scores, row[s]), 0) / sites.length) };
    }) }));
    for (const draw of drawings.slice(before)) draw.ofSite = true;
    for (const { run, sites } of found) card.append(changesTable(run, sites));
  });
}

function changesTable(run, sites) {
  const ranks = run.ranks, rows = [];
  for (let row = 1; row < ranks.steps.length; row++) for (const site of sites) {
    const before = ranks.sites[row - 1][site], after = ranks.sites[row][site];
    if (before !== after) rows.push([ranks.steps[row], siteName(ranks, site).split(":")[1] || "", `${before} to ${after}`]);
  }
  if (!rows.length) return el("p", { class: "note" }, `${run.name}: its rank never changed.`);
  const open = el("details", {}, el("summary", {}, `${run.name}: ${rows.length} change${rows.length === 1 ? "" : "s"}`));
  open.append(el("div", { class: "scroll" }, el("table", {}, el("tbody", {}, ...rows.slice(0, 1000).map((cells) => el("tr", {}, ...cells.map((c) => el("td", {}, String(c)))))))));
  return open;
}

function decisions(run) {
  const ranks = run.ranks, card = cards("decision-cards")(run.label);
  if (!ranks.events.length) { card.append(el("p", { class: "note" }, "No event: the ranks stayed as they were.")); return; }
  const names = [...new Set(ranks.events.flatMap((e) => Object.keys(e.scores)))];
  const numbers = ["event", "step", "total", "sites", "pruned", "born", "masked"].filter((n) => ranks.events.some((e) => e[n]));
  const head = el("tr", {}, ...numbers.map((n) => el("th", { class: "number" }, n)), ...names.map((n) => el("th", { class: "number" }, n.replaceAll("_", " "))), el("th", { class: "number" }, "ms"), el("th", {}, "reason"));
  const body = el("tbody", {}, ...ranks.events.map((e) => el("tr", { class: "click", title: "show the ranks after this event", on: { click: () => set({ step: e.step }) } },
    ...numbers.map((n) => el("td", { class: "number" }, String(e[n]))), ...names.map((n) => el("td", { class: "number" }, short(e.scores[n]))),
    el("td", { class: "number" }, e.seconds === null ? "" : short(1000 * e.seconds)), el("td", { class: "reason" }, e.reason))));
  const lines = names.filter((n) => !/^num_|forwards|fraction/.test(n) && ranks.events.some((e) => e.scores[n] > 0));
  if (lines.length && ranks.events.length > 1) {
    const positive = lines.every((n) => ranks.events.every((e) => !Number.isFinite(e.scores[n]) || e.scores[n] > 0));
    lineChart(card, positive ? "Scores that decided (logarithmic)" : "Scores that decided", () => ({ log: positive, series: lines.slice(0, 8).map((n, i) => ({ name: n.replaceAll("_", " "), colour: kindColour(i), x: ranks.events.map((e) => e.step), y: ranks.events.map((e) => e.scores[n] ?? NaN) })) }), { height: 160 });
  }
  card.append(el("div", { class: "scroll" }, el("table", {}, el("thead", {}, head), body)));
  if (ranks.changes.length < ranks.numEvents) card.append(el("p", { class: "note" }, `The maps show ${ranks.changes.length} of ${ranks.numEvents} events, evenly chosen: all would make this file too large.`));
}

// ---- time, settings ----

function phases() {
  const card = cards("phase-cards")();
  const order = ["steps", "evaluate", "checkpoint", "allocator", "ablation", "resize"];
  for (const run of RUNS) {
    const p = { ...run.phases };
    // a resize and an ablation happen inside the allocator's section
    if (p.allocator !== undefined) p.allocator = Math.max(0, p.allocator - (p.resize || 0) - (p.ablation || 0));
    const named = Object.values(p).reduce((a, b) => a + b, 0);
    const parts = [["steps", Math.max(0, run.elapsed - named)], ...Object.entries(p)].filter(([, v]) => v > 0).sort((a, b) => (order.indexOf(a[0]) + 1 || 99) - (order.indexOf(b[0]) + 1 || 99));
    if (!run.elapsed) { card.append(el("h3", {}, run.name), el("p", { class: "note" }, "No step was recorded yet.")); continue; }
    const bar = el("div", { style: "display:flex;height:18px;border-radius:4px;overflow:hidden;margin:.2rem 0 .3rem" }, ...parts.map(([name, v], i) => el("span", { style: `flex:${v} 0 0;background:${kindColour(i)}`, title: `${name}: ${duration(v)}` })));
    card.append(el("h3", {}, `${run.name}: ${duration(run.elapsed)}`), bar, el("div", { class: "legend" }, ...parts.map(([name, v], i) => el("span", {}, el("i", { style: `background:${kindColour(i)}` }), `${name} ${v < 60 ? v.toPrecision(3) + " s" : duration(v)} (${(100 * v / run.elapsed).toPrecision(2)} %)`))));
    const startup = Object.entries(run.startup).sort((a, b) => b[1] - a[1]);
    if (startup.length) card.append(el("p", { class: "note" }, `The last start, before that: ${startup.map(([n, v]) => `${n} ${short(v)} s`).join(", ")}`));
  }
  card.append(el("p", { class: "note" }, "steps: forward, backward, sum over the processes and update. Host time of process 0."));
}

function settings() {
  const host = at("settings"), show = (v) => (v === null || v === undefined ? "" : typeof v === "object" ? JSON.stringify(v) : String(v));
  const head = () => el("thead", {}, el("tr", {}, el("th"), ...RUNS.map((run) => el("th", {}, run.name))));
  const table = (rows) => el("div", { class: "card scroll" }, el("table", {}, head(), el("tbody", {}, ...rows.map(([name, ...values]) => el("tr", {}, el("th", { scope: "row" }, name), ...values.map((v) => el("td", {}, show(v))))))));
  if (DATA.differences.length) host.append(el("h3", {}, "Settings that differ"), table(DATA.differences));
  const versions = [...new Set(RUNS.flatMap((run) => Object.keys(run.versions)))];
  if (versions.length) host.append(el("h3", { style: "margin-top:.8rem" }, "Versions of the last start"), table(versions.map((name) => [name, ...RUNS.map((run) => run.versions[name])])));
  for (const run of RUNS) if (run.config) host.append(el("details", { class: "card", style: "margin-top:.6rem" }, el("summary", {}, `config.yaml of ${run.name}`), el("pre", {}, run.config)));
}

const view = stored("ardtrain-view");
if (view) Object.assign(state, view, { step: view.step ?? Infinity });
overview();
curves();
if (WITH_RANKS.length) rankSections();
else for (const id of ["ranks", "time", "flow", "layers", "decisions"]) at(id).replaceChildren(...(id === "ranks" ? [el("h2", {}, "Ranks"), el("p", { class: "note" }, "No run here has ranks.")] : []));
phases();
settings();
for (const draw of changed) draw();
document.documentElement.dataset.ready = "yes";
