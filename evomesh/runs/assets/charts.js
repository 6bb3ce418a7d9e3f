"use strict";
// Charts: their figures, drawing, zoom, keys, and the table beside each.
const CHARTS = [
  { id: "loss", names: /^loss$/ }, { id: "types", names: /^loss\// }, { id: "val", names: /^val\/.*_loss$/, points: true },
  { id: "acc", names: /^(acc|val\/.*_acc)$/ }, { id: "lr", names: /^lr$/ }, { id: "norm", names: /^grad_norm$/ },
  { id: "speed", names: /^speed$/ }, { id: "tflops", names: /^tflops$/ }, { id: "memory", names: /^memory$/, factor: 2 ** -30 },
  { id: "progress", names: /^tokens\//, sums: true }, { id: "consumed", names: /^num_consumed_tokens$/ },
  { id: "seconds", names: /^(seconds|wait)$/ }, { id: "samples", names: /^num_samples_in_batch$/ }, { id: "scale", names: /^loss_scale$/, varies: true },
];
const DASHES = [[], [6, 3], [2, 3], [9, 3, 2, 3]];

function numbersOf(text) {
  const bytes = atob(text), buffer = new Uint8Array(bytes.length);
  for (let i = 0; i < bytes.length; i++) buffer[i] = bytes.charCodeAt(i);
  return new Float32Array(buffer.buffer);
}

function decodeRun(run) {
  const steps = run.steps.map((text) => Array.from(numbersOf(text))), figures = {};
  for (const [name, column] of Object.entries(run.columns)) {
    const raw = numbersOf(column.y), values = new Array(raw.length);
    for (let i = 0; i < raw.length; i++) values[i] = Number.isNaN(raw[i]) ? null : raw[i];
    figures[name] = { x: steps[column.x], y: values };
  }
  return figures;
}

function seriesOf(chart, runs) {
  const found = [];
  for (const run of runs) {
    for (const [name, figure] of Object.entries(run.figures)) {
      if (!chart.names.test(name)) continue;
      let y = figure.y;
      if (chart.factor) y = y.map((v) => (v === null ? null : v * chart.factor));
      if (chart.sums) { let sum = 0; y = y.map((v) => (sum += v || 0)); }
      if (chart.varies && y.every((v) => v === y[0])) continue;
      const label = name.replace(/^(loss|tokens)\//, "").replace(/^val\/(.*)_(loss|acc)$/, "$1");
      const short = { speed: "tokens/s", memory: "GiB", num_consumed_tokens: t("tokens"), num_samples_in_batch: t("c_samples"), seconds: t("seconds"), wait: t("wait"), lr: t("c_lr"), grad_norm: t("c_norm"), loss: t("loss") }[name] || label;
      found.push({ label: runs.length > 1 ? `${run.short} · ${short}` : short, x: figure.x, y });
    }
  }
  return found;
}

function aligned(series) {
  if (series.every((s) => s.x === series[0].x)) return [series[0].x, ...series.map((s) => s.y)];
  return uPlot.join(series.map((s) => [s.x, s.y]), series.map(() => [1, 1]));
}

function extremes(s) {
  let low = -1, high = -1, first = -1, last = -1;
  for (let i = 0; i < s.y.length; i++) {
    const v = s.y[i];
    if (v === null) continue;
    if (first < 0) first = low = high = i;
    if (v < s.y[low]) low = i;
    if (v > s.y[high]) high = i;
    last = i;
  }
  return first < 0 ? null : { first, last, low, high };
}

function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e15 || (size > 0 && size < 1e-3)) return value.toExponential(2);
  for (const [unit, name] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    const scaled = unit === 1e4 ? 1e3 : unit;
    if (size >= unit) return `${+(value / scaled).toPrecision(4)}${name}`;
  }
  return String(+value.toPrecision(4));
}

function sentence(series) {
  return series.slice(0, 12).map((s) => {
    const e = extremes(s);
    if (!e) return `${s.label}: ${t("none")}`;
    const at = (i) => (language === "zh" ? `${t("at")} ${s.x[i]} 步` : `${t("at")} ${s.x[i]}`);
    return `${s.label}: ${t("first")} ${short(s.y[e.first])}, ${t("last")} ${short(s.y[e.last])}, ${t("lowest")} ${short(s.y[e.low])} ${at(e.low)}, ${t("highest")} ${short(s.y[e.high])} ${at(e.high)}`;
  }).join("; ");
}

function sampleTable(series, data) {
  const count = data[0].length, rows = [], wanted = Math.min(count, 25);
  for (let k = 0; k < wanted; k++) {
    const i = wanted === 1 ? 0 : Math.round((k * (count - 1)) / (wanted - 1));
    rows.push([data[0][i], ...series.map((_, s) => short(data[s + 1][i]))]);
  }
  return tableOf([t("step"), ...series.map((s) => s.label)], rows, rows[0] ? rows[0].map(() => true) : []);
}

const drawn = [];

class ChartView {
  constructor(chart, series) {
    this.chart = chart; this.series = series; this.log = false; this.plot = null;
    this.data = aligned(series);
    const title = t(`c_${chart.id}`);
    this.box = make("div", { class: "plot", tabindex: "0", role: "group", "aria-label": `${title}. ${sentence(series)}. ${t("keys")}` });
    const logs = make("button", { type: "button", "aria-pressed": "false" }, t("log"));
    logs.onclick = () => { this.log = !this.log; logs.setAttribute("aria-pressed", this.log); this.draw(); };
    const whole = make("button", { type: "button" }, t("all"));
    whole.onclick = () => this.zoom(null);
    this.details = make("details", {}, make("summary", {}, `${t("table")}: ${title}`));
    this.details.addEventListener("toggle", () => { if (this.details.open && !this.details.dataset.made) { this.details.dataset.made = "1"; this.details.append(sampleTable(series, this.data)); } });
    this.figure = make("figure", { id: `chart-${chart.id}` }, make("div", { class: "head" }, make("h3", {}, title), make("div", { class: "buttons" }, logs, whole)),
      this.box, make("figcaption", {}, sentence(series)), this.details);
    this.box.addEventListener("keydown", (event) => this.key(event));
    this.sizes = new ResizeObserver(() => { if (this.plot && this.box.clientWidth) this.plot.setSize({ width: this.box.clientWidth, height: 230 }); });
    this.sizes.observe(this.box);
    drawn.push(this);
  }

  draw() {
    const range = this.plot && [this.plot.scales.x.min, this.plot.scales.x.max];
    if (this.plot) this.plot.destroy();
    const style = getComputedStyle(document.documentElement), color = (name) => style.getPropertyValue(name).trim();
    const axis = { stroke: color("--soft"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line") }, font: "12px system-ui, sans-serif" };
    const few = this.data[0].length < 60 || this.chart.points;
    const lines = this.series.map((s, i) => ({ label: s.label, stroke: color(`--c${i % 8}`), width: 1.5, dash: DASHES[Math.floor(i / 8) % 4],
      spanGaps: Boolean(this.chart.points) || this.series.some((o) => o.x !== this.series[0].x), points: { show: few, size: 5 }, value: (_, v) => short(v) }));
    const data = this.log ? this.data.map((column, i) => (i ? column.map((v) => (v > 0 ? v : null)) : column)) : this.data;
    const height = 230, width = this.box.clientWidth || 500;
    this.plot = new uPlot({ width, height, legend: { live: true }, cursor: { drag: { x: true, y: false, dist: 5 }, focus: { prox: 24 } },
      scales: { x: { time: false }, y: this.log ? { distr: 3 } : {} },
      series: [{ label: t("step"), value: (_, v) => (v === null ? "–" : String(v)) }, ...lines],
      axes: [axis, { ...axis, size: 58, values: (_, ticks) => ticks.map((v) => (v === null ? "" : short(v))) }] }, data, this.box);
    if (range && range[0] !== null) this.zoom(range);
  }

  zoom(range) {
    if (!this.plot) return;
    const x = this.data[0], [min, max] = range || [x[0], x[x.length - 1]];
    this.plot.setScale("x", { min, max: max > min ? max : min + 1 });
  }

  key(event) {
    const plot = this.plot;
    if (!plot || event.target !== this.box) return;
    const x = this.data[0], { min, max } = plot.scales.x, span = max - min;
    const at = plot.cursor.idx === null || plot.cursor.idx === undefined ? 0 : plot.cursor.idx;
    const jump = event.shiftKey ? 1 : Math.max(1, Math.round(x.length * (span / (x[x.length - 1] - x[0] || 1)) / 100));
    let to = null;
    if (event.key === "ArrowRight") to = Math.min(x.length - 1, at + jump);
    else if (event.key === "ArrowLeft") to = Math.max(0, at - jump);
    else if (event.key === "Home") to = 0;
    else if (event.key === "End") to = x.length - 1;
    else if (event.key === "+" || event.key === "=") this.zoom([Math.max(x[0], x[at] - span / 4), Math.min(x[x.length - 1], x[at] + span / 4)]);
    else if (event.key === "-") this.zoom([Math.max(x[0], min - span / 2), Math.min(x[x.length - 1], max + span / 2)]);
    else if (event.key === "0") this.zoom(null);
    else return;
    event.preventDefault();
    if (to === null) return;
    if (x[to] < min || x[to] > max) this.zoom([x[to] - span / 2, x[to] + span / 2]);
    plot.setCursor({ left: plot.valToPos(x[to], "x"), top: 20 });
    const values = this.series.map((s, i) => `${s.label} ${short(this.data[i + 1][to])}`);
    document.getElementById("spoken").textContent = `${t("step")} ${x[to]}: ${values.join(", ")}`;
  }

  close() { this.sizes.disconnect(); if (this.plot) this.plot.destroy(); }
}
