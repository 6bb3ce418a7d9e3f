"use strict";
// Charts: drawing, zoom, keys, and the table beside each.
const DASHES = [[], [6, 3], [2, 3], [9, 3, 2, 3]];

function aligned(series) {
  if (series.every((s) => s.x === series[0].x)) return [series[0].x, ...series.map((s) => s.y)];
  return uPlot.join(series.map((s) => [s.x, s.y]), series.map(() => [1, 1]));
}

function extremes(s) {
  const y = s.y;
  let low = -1, high = -1, first = -1, last = -1;
  for (let i = 0; i < y.length; i++) {
    const v = y[i];
    if (v === null) continue;
    if (first < 0) first = low = high = i;
    if (v < y[low]) low = i;
    if (v > y[high]) high = i;
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

// Where on the x axis: the step, or of a chart with "labels" the name of the place.
function placeOf(chart, x) { return chart.labels ? chart.labels[x] ?? "" : String(x); }
function sentence(chart, series) {
  return series.slice(0, 12).map((s) => {
    const e = extremes(s);
    if (!e) return `${s.label}: ${t("none")}`;
    const { x, y } = s;
    const at = (i) => (chart.x ? `${t("for_x")} ${placeOf(chart, x[i])}` : language === "zh" ? `${t("at")} ${x[i]} 步` : `${t("at")} ${x[i]}`);
    return `${s.label}: ${t("first")} ${short(y[e.first])}, ${t("last")} ${short(y[e.last])}, ${t("lowest")} ${short(y[e.low])} ${at(e.low)}, ${t("highest")} ${short(y[e.high])} ${at(e.high)}`;
  }).join("; ");
}

function sampleTable(chart, series, data) {
  const count = data[0].length, rows = [], wanted = Math.min(count, chart.labels ? 60 : 25);
  for (let k = 0; k < wanted; k++) {
    const i = wanted === 1 ? 0 : Math.round((k * (count - 1)) / (wanted - 1));
    rows.push([placeOf(chart, data[0][i]), ...series.map((_, s) => short(data[s + 1][i]))]);
  }
  return tableOf([t(chart.x || "step"), ...series.map((s) => s.label)], rows, rows[0] ? rows[0].map(() => true) : []);
}

const drawn = [];

class ChartView {
  constructor(chart, series) {
    this.chart = chart; this.series = series; this.log = false; this.plot = null;
    const title = (this.title = chart.title ?? t(`c_${chart.id}`));
    this.box = make("div", { class: "plot", tabindex: "0", role: "group", "aria-label": `${title}. ${this.keysText}` });
    this.caption = make("figcaption");
    this.details = make("details", {}, make("summary", {}, `${t("table")}: ${title}`));
    this.details.addEventListener("toggle", () => { if (this.details.open && !this.details.dataset.made) { this.details.dataset.made = "1"; this.details.append(this.table()); } });
    this.figure = make("figure", { id: `chart-${chart.id}` }, make("div", { class: "head" }, make("h3", {}, title), make("div", { class: "buttons" }, ...this.buttons())),
      this.box, this.caption, this.details);
    this.box.addEventListener("keydown", (event) => this.key(event));
    this.sizes = new ResizeObserver(() => { if (this.plot && this.box.clientWidth) this.plot.setSize({ width: this.box.clientWidth, height: this.height }); });
    this.sizes.observe(this.box);
    drawn.push(this);
  }

  get keysText() { return t("keys"); }
  get height() { return 230; }
  get printSize() { return { width: Math.min(340, this.box.clientWidth || 340), height: 200 }; }
  sentence() { return sentence(this.chart, this.series); }
  table() { return sampleTable(this.chart, this.series, this.data); }
  buttons() {
    const logs = make("button", { type: "button", "aria-pressed": "false" }, t("log"));
    logs.onclick = () => { this.log = !this.log; logs.setAttribute("aria-pressed", this.log); this.draw(); };
    return [logs, this.wholeButton()];
  }
  wholeButton() {
    const whole = make("button", { type: "button" }, t("all"));
    whole.onclick = () => this.zoom(null);
    return whole;
  }

  get data() { return (this.columns ??= aligned(this.series)); }

  // The sentence of the chart, which needs all of its numbers.
  fill() {
    if (this.isFilled) return;
    this.isFilled = true;
    const text = this.chart.marks?.length ? `${this.sentence()}; ${t("marked")}` : this.sentence();
    this.caption.textContent = text;
    this.box.setAttribute("aria-label", `${this.title}. ${text}. ${this.keysText}`);
  }

  draw() {
    this.fill();
    const range = this.plot && [this.plot.scales.x.min, this.plot.scales.x.max];
    if (this.plot) this.plot.destroy();
    const style = getComputedStyle(document.documentElement), color = (name) => style.getPropertyValue(name).trim();
    const axis = { stroke: color("--soft"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line") }, font: "12px system-ui, sans-serif" };
    const few = this.data[0].length < 60 || this.chart.points;
    const lines = this.series.map((s, i) => ({ label: s.label, stroke: color(`--c${i % 8}`), width: 1.5, dash: DASHES[Math.floor(i / 8) % 4],
      spanGaps: Boolean(this.chart.points) || this.series.some((o) => o.x !== this.series[0].x), points: { show: few && !this.chart.bars, size: 5 }, ...(this.chart.bars ? { paths: uPlot.paths.bars({ size: [0.8, 60] }), fill: `${color(`--c${i % 8}`)}99` } : {}), value: (_, v) => short(v) }));
    const data = this.log ? this.data.map((column, i) => (i ? column.map((v) => (v > 0 ? v : null)) : column)) : this.data;
    const height = this.height, width = this.box.clientWidth || 500;
    this.plot = new uPlot({ width, height, legend: { live: true }, cursor: { drag: { x: true, y: false, dist: 5 }, focus: { prox: 24 } },
      scales: { x: { time: false, ...(this.chart.logX ? { distr: 3 } : {}), ...(this.chart.labels ? { range: (_, low, high) => [low - 0.6, high + 0.6] } : {}) }, y: this.log ? { distr: 3 } : {} },
      series: [{ label: t(this.chart.x || "step"), value: (_, v) => (v === null ? "–" : placeOf(this.chart, v)) }, ...lines],
      hooks: { draw: [(plot) => this.mark(plot, color("--c3"))] },
      axes: [{ ...axis, label: t(this.chart.x || "step"), labelSize: 16, labelFont: axis.font, size: 34, ...this.places() }, { ...axis, size: 58, values: (_, ticks) => ticks.map((v) => (v === null ? "" : short(v))) }] }, data, this.box);
    if (range && range[0] !== null) this.zoom(range);
  }

  // Steps with something to say, such as spikes, have an upright line.
  mark(plot, stroke) {
    const { ctx, bbox } = plot, { min, max } = plot.scales.x;
    ctx.save();
    ctx.strokeStyle = stroke;
    ctx.setLineDash([3, 3]);
    for (const step of this.chart.marks || []) {
      if (step < min || step > max) continue;
      const x = plot.valToPos(step, "x", true);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }

  // The axis of a chart with "labels" has one of them at each whole number, as far as there is room.
  places() {
    if (this.chart.logX) return { values: (_, ticks) => ticks.map((v) => (v === null ? "" : short(v))) };
    if (!this.chart.labels) return {};
    return { incrs: [1, 2, 3, 4, 5, 10], space: 62, values: (_, ticks) => ticks.map((v) => (Number.isInteger(v) ? placeOf(this.chart, v) : "")) };
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
    document.getElementById("spoken").textContent = this.describeAt(to);
  }
  // What is at the point with an index.
  describeAt(i) {
    const values = this.series.map((s, k) => `${s.label} ${short(this.data[k + 1][i])}`);
    return `${t(this.chart.x || "step")} ${placeOf(this.chart, this.data[0][i])}: ${values.join(", ")}`;
  }

  close() { this.sizes.disconnect(); if (this.plot) this.plot.destroy(); }
}
