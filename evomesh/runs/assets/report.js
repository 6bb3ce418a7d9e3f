"use strict";
// The page: summary, charts and tables of the runs in the payload, in two languages.
let runs = [];

function perRun(id, part) {
  const parts = runs.map((run) => { const content = part(run); return content && make("div", { class: "run" }, runs.length > 1 ? make("h3", {}, run.name) : null, content); });
  return parts.some(Boolean) ? section(id, ...parts.filter(Boolean)) : null;
}
function cards(run) {
  const s = run.summary, total = s.total ? ` / ${whole(s.total)}` : "";
  const rows = [["state", t(s.state)], ["steps", `${whole(s.next_step)}${total}`], ["loss", short(s.loss)], ["lowest_loss", short(s.lowest_loss)], ["tokens", short(s.tokens)], ["speed", short(s.speed)],
    ["wall", s.wall === undefined ? null : duration(s.wall)], ["goodput", s.wall === undefined ? null : percent(s.goodput)], ["restarts", s.restarts === undefined ? null : whole(s.restarts)],
    ["rollbacks", s.rollbacks ? whole(s.rollbacks) : null],
    ["restart_cost", s.restarts || s.rollbacks ? duration(s.restart_cost) : null], ["skips", s.skipped ? whole(s.skipped) : null], ["devices", `${whole(s.world_size)}${s.device ? ` · ${s.device}` : ""}`]];
  return make("dl", { class: "cards" }, ...rows.filter((row) => row[1] !== null).map(([key, value]) => make("div", {}, make("dt", {}, t(key)), make("dd", {}, value))));
}
function notes(run) {
  const lines = [];
  if (!run.has_history) lines.push(t("no_history"));
  if (!run.summary.steps) lines.push(t("no_metrics"));
  for (const [file, count] of Object.entries(run.unreadable)) lines.push(`${file}: ${whole(count)} ${t("unreadable")}`);
  return lines.map((line) => make("p", { class: "note warn" }, line));
}
function times(run) {
  if (!run.times) return null;
  const { wall, causes } = run.times, names = Object.keys(causes), color = (i) => `background:var(--c${i === 0 ? 2 : [1, 4, 0, 3, 5, 6, 7][(i - 1) % 7]})`;
  const bar = make("div", { class: "bar", role: "img", "aria-label": names.map((name) => `${t(name)} ${percent(causes[name] / (wall || 1))}`).join(", ") },
    ...names.map((name, i) => make("span", { style: `${color(i)};width:${(100 * causes[name]) / (wall || 1)}%`, title: t(name) })));
  const rows = names.map((name, i) => [make("span", {}, make("span", { class: "swatch", style: color(i) }), t(name)), fixed(causes[name]), percent(causes[name] / (wall || 1))]);
  rows.push([t("total"), fixed(wall), percent(wall ? 1 : 0)]);
  return make("div", {}, bar, tableOf([t("cause"), t("seconds"), t("share")], rows, [false, true, true]));
}
function starts(run) {
  if (!run.times) return null;
  const rows = run.times.starts.map((s) => [s.number, date(s.began), s.first_step, s.steps, s.outcome ? t(s.outcome) : t("no_end"), fixed(s.down), fixed(s.starting), s.recomputed, fixed(s.cost), s.reason]);
  return tableOf(["number", "began", "from_step", "steps", "outcome", "downs", "starting", "again", "cost", "reason"].map(t), rows, [true, false, true, true, false, true, true, true, true]);
}
function saves(run) {
  if (!run.saves.length) return null;
  return tableOf(["step", "when", "waited", "final"].map(t), run.saves.map((s) => [s.step, date(s.time), fixed(s.seconds, 2), s.final ? "✓" : ""]), [true, false, true]);
}
function alerts(run) { return run.alerts.length ? tableOf(["when", "kind", "text"].map(t), run.alerts.map((a) => [date(a.time), a.kind, a.text])) : null; }
function skipped(run) { return run.skipped.length ? tableOf(["step", "loss", "grad_norm"].map(t), run.skipped.map((s) => [s.step, s.loss, s.grad_norm]), [true, true, true]) : null; }
const figureOf = (value) => (typeof value === "number" ? short(value) : value ?? "–");
const placed = (figures, digits) => Object.entries(figures || {}).map(([name, value]) => `${t(name)} ${typeof value === "number" ? +value.toPrecision(digits) : value}`).join(", ");
function courtOf({ step, court }) {
  const list = make("ul", {}, ...court.micro_batches.map((m) => make("li", {}, `${t("rank")} ${m.rank}, ${t("micro_batch")} ${m.micro_batch}: ${t("loss")} ${figureOf(m.loss)}, ${t("grad_norm")} ${figureOf(m.grad_norm)} (${figureOf(m.suspicion)} ${t("times_others")})`,
    ...m.documents.map((d) => make("div", {}, make("code", {}, `${d.file}:${d.row}`), ` ${t("tokens")} ${d.start}..${d.stop - 1}`, make("span", { class: "text" }, d.text))))));
  const layers = court.layers.map((l) => `${l.layer}: ${t("grad_norm")} ×${figureOf(l.grad_norm_ratio)}, ${t("activations")} ×${figureOf(l.activation_ratio)}${l.not_finite ? `, ${t("not_finite")}` : ""}`);
  return make("details", {}, make("summary", {}, `${t("step")} ${step}: ${t("court")}`), list, layers.length ? make("p", {}, `${t("layers")}: ${layers.join("; ")}`) : null);
}
function spikes(run) {
  if (!run.spikes.length) return null;
  const action = (s) => `${t(s.action === "skipped" ? "skipped_action" : s.action)}${s.to === undefined ? "" : ` (${t("back_to")} ${s.to})`}${s.left_out.length ? `; ${t("left_out")} ${s.left_out.join(", ")}` : ""}`;
  const rows = run.spikes.map((s) => [s.step, date(s.time), (s.what || []).map(t).join(", "), figureOf(s.loss), figureOf(s.grad_norm), placed(s.median, 4), action(s)]);
  const table = tableOf(["step", "when", "what", "loss", "grad_norm", "median", "action"].map(t), rows, [true, false, false, true, true]);
  // What a step consisted of needs the whole width.
  return make("div", {}, table, ...run.spikes.filter((s) => s.court).map(courtOf));
}
function samples(run) {
  if (!run.samples.length) return null;
  const rows = (sample) => sample.answers.map((a) => [a.step, whole(a.tokens), make("span", { class: "text" }, a.text)]);
  return make("div", {}, ...run.samples.map((sample, i) => make("details", i < 3 ? { open: "" } : {}, make("summary", {}, make("code", {}, sample.prompt)), tableOf(["step", "tokens", "text"].map(t), rows(sample), [true, true]))));
}
function predictions(run) {
  if (!run.predictions.length) return null;
  const shown = (row, value) => (row.name === "plan_memory" ? `${fixed(value / 2 ** 30, 2)} GiB` : whole(Math.round(value)));
  const rows = run.predictions.map((row) => [t(row.name), shown(row, row.predicted), shown(row, row.measured), percent(row.measured / (row.predicted || 1))]);
  const onCpu = run.summary.device && !String(run.summary.device).startsWith("cuda") ? make("p", { class: "soft" }, t("plan_cpu")) : null;
  return make("div", {}, tableOf(["figure", "predicted", "measured", "of_prediction"].map(t), rows, [false, true, true, true]), onCpu);
}
function dataTable(run) {
  if (!run.data.length) return null;
  const names = ["documents", "tokens", "filtered", "dropped", "packs"], sum = (name) => run.data.reduce((total, row) => total + (row[name] || 0), 0);
  const rows = run.data.map((row) => [row.file, row.type, ...names.map((name) => whole(row[name]))]);
  rows.push([t("total"), "", ...names.map((name) => whole(sum(name)))]);
  return make("div", {}, tableOf(["file", "type", ...names].map(t), rows, [false, false, true, true, true, true, true]), make("p", {}, `${t("fingerprint")}: `, make("code", {}, run.fingerprint || "–")));
}
function facts(run) { const rows = Object.entries(run.facts).map(([name, value]) => [t(name), value]); return rows.length ? tableOf([t("key"), t("value")], rows) : null; }
function config() {
  const tables = runs.map((run) => new Map(run.config.map(([key, value, from]) => [key, { value, from }])));
  const keys = [...new Set(tables.flatMap((table) => [...table.keys()]))];
  if (!keys.length) return null;
  const many = runs.length > 1, differs = (key) => tables.some((table) => table.get(key)?.value !== tables[0].get(key)?.value);
  const heads = [t("key"), ...runs.flatMap((run) => (many ? [run.short] : [t("value"), t("from")]))];
  const box = make("div"), input = make("input", { type: "search", "aria-label": t("filter"), placeholder: t("filter") });
  const only = make("button", { type: "button", "aria-pressed": "true" }, t(many ? "only_diff" : "only_set"));
  const show = () => {
    const pressed = only.getAttribute("aria-pressed") === "true", wanted = input.value.toLowerCase();
    const shown = keys.filter((key) => key.toLowerCase().includes(wanted) && (!pressed || (many ? differs(key) : tables[0].get(key).from !== "default")));
    const rows = shown.map((key) => [key, ...tables.flatMap((table) => { const item = table.get(key) || {}; return many ? [item.value] : [item.value, item.from]; })]);
    box.replaceChildren(tableOf(heads, rows, [], (row) => (many && differs(row[0]) ? "differs" : "")));
  };
  input.oninput = show;
  only.onclick = () => { only.setAttribute("aria-pressed", only.getAttribute("aria-pressed") !== "true"); show(); };
  show();
  return section("config", make("div", { class: "buttons" }, input, only), box);
}
function build() {
  startPage();
  runs = payload.runs.map((run) => ({ ...run, short: run.name.split("/").pop(), figures: decodeRun(run) }));
  const names = runs.map((run) => run.name).join(", ");
  document.title = `${names} – evomesh`;
  document.getElementById("title").textContent = `${t("report")}: ${runs.length > 2 ? `${runs.length} ${t("runs")}` : names}`;
  document.getElementById("subtitle").textContent = `${runs.map((run) => run.folder).join(", ")} · ${t("written")} ${date(payload.written)}`;
  const views = [];
  const marks = runs.length === 1 ? runs[0].spikes.map((s) => s.step) : [];
  for (const described of CHARTS) { const chart = described.marked ? { ...described, marks } : described; const series = seriesOf(chart, runs); if (series.length) views.push(new ChartView(chart, series)); }
  const grid = views.length ? section("charts", make("p", { class: "soft" }, t("drag")), make("div", { class: "charts" }, ...views.map((view) => view.figure))) : null;
  const parts = [perRun("summary", (run) => make("div", {}, cards(run), ...notes(run))), grid, perRun("time", times), perRun("starts", starts), perRun("saves", saves),
    perRun("predictions", predictions), perRun("spikes", spikes), perRun("skipped", skipped), perRun("samples", samples), perRun("alerts", alerts), perRun("data", dataTable), perRun("facts", facts), config()].filter(Boolean);
  showParts(parts, t("report"));
  drawNear(views);
}
function follow() {
  const line = document.getElementById("live"), source = new EventSource("events");
  line.hidden = false;
  source.onopen = () => { line.textContent = `● ${t("live")}`; };
  source.onerror = () => { line.textContent = t("lost"); };
  source.onmessage = (event) => {
    payload = JSON.parse(event.data);
    const y = scrollY, focused = document.activeElement?.closest?.("figure")?.id, open = [...document.querySelectorAll("details[open]")].map((d) => d.closest("figure")?.id);
    const ranges = new Map(drawn.filter((v) => v.plot).map((v) => [v.chart.id, { min: v.plot.scales.x.min, max: v.plot.scales.x.max, end: v.data[0][v.data[0].length - 1], begin: v.data[0][0], log: v.log }]));
    build();
    for (const view of drawn) {
      const before = ranges.get(view.chart.id);
      if (before) { view.log = before.log; view.draw(); if (before.max < before.end || before.min > before.begin) view.zoom([before.min, before.max]); }
      if (open.includes(view.figure.id)) view.details.open = true;
      if (view.figure.id === focused) view.box.focus({ preventScroll: true });
    }
    scrollTo(0, y);
    document.documentElement.dataset.updates = String(Number(document.documentElement.dataset.updates || 0) + 1);
  };
}
applyTheme();
build();
if (payload.live) follow();
document.documentElement.dataset.ready = "1";
