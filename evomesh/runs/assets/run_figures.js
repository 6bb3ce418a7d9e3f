"use strict";
// The figures of runs, and which chart shows which.
// Accuracies and the like, which share an axis.
const inUnit = (y) => y.every((v) => v === null || (v >= 0 && v <= 1));
const CHARTS = [
  { id: "loss", names: /^loss$/, marked: true }, { id: "types", names: /^loss\// }, { id: "val", names: /^val\/.*_loss$/, points: true },
  { id: "eval", names: /^eval\//, points: true, keeps: inUnit }, { id: "eval_other", names: /^eval\//, points: true, keeps: (y) => !inUnit(y) },
  { id: "acc", names: /^(acc|val\/.*_acc)$/ }, { id: "lr", names: /^lr$/ }, { id: "norm", names: /^grad_norm$/, marked: true },
  { id: "speed", names: /^speed$/ }, { id: "tflops", names: /^tflops$/ }, { id: "memory", names: /^memory$/, factor: 2 ** -30 },
  { id: "progress", names: /^tokens\//, sums: true }, { id: "consumed", names: /^num_consumed_tokens$/ },
  { id: "seconds", names: /^(seconds|wait)$/ }, { id: "samples", names: /^num_samples_in_batch$/ }, { id: "scale", names: /^loss_scale$/, varies: true },
];

// A figure of a run. Most are far down the page: their numbers are decoded when they are first asked for.
class StoredFigure {
  constructor(steps, column) { this.steps = steps; this.column = column; this.isEmpty = column.y.length === 0; }
  get x() {
    const place = this.column.x;
    if (typeof this.steps[place] === "string") this.steps[place] = Array.from(numbersOf(this.steps[place]));
    return this.steps[place];
  }
  get y() {
    if (this.values) return this.values;
    const raw = numbersOf(this.column.y), values = new Array(raw.length);
    for (let i = 0; i < raw.length; i++) values[i] = Number.isNaN(raw[i]) ? null : raw[i];
    return (this.values = values);
  }
}

function decodeRun(run) {
  const steps = [...run.steps];
  return Object.fromEntries(Object.entries(run.columns).map(([name, column]) => [name, new StoredFigure(steps, column)]));
}

// A line of a chart: a figure in the chart's unit, or its sum so far.
class FigureSeries {
  constructor(label, figure, chart) { this.label = label; this.figure = figure; this.chart = chart; }
  get x() { return this.figure.x; }
  get y() {
    if (this.values) return this.values;
    let y = this.figure.y;
    if (this.chart.factor) y = y.map((v) => (v === null ? null : v * this.chart.factor));
    if (this.chart.sums) { let sum = 0; y = y.map((v) => (sum += v || 0)); }
    return (this.values = y);
  }
}

function seriesOf(chart, runs) {
  const found = [];
  for (const run of runs) {
    for (const [name, figure] of Object.entries(run.figures)) {
      if (!chart.names.test(name) || figure.isEmpty) continue;
      if (chart.keeps && !chart.keeps(figure.y)) continue;
      if (chart.varies && figure.y.every((v) => v === figure.y[0])) continue;
      const label = name.replace(/^(loss|tokens|eval)\//, "").replace(/^val\/(.*)_loss$/, "$1").replace(/^val\/(.*)_acc$/, `${t("of_validation")} $1`);
      const short = { speed: "tokens/s", memory: "GiB", num_consumed_tokens: t("tokens"), num_samples_in_batch: t("c_samples"), seconds: t("seconds"), acc: t("of_training"), wait: t("wait"), lr: t("c_lr"), grad_norm: t("c_norm"), loss: t("loss") }[name] || label;
      found.push(new FigureSeries(runs.length > 1 ? `${run.short} · ${short}` : short, figure, chart));
    }
  }
  return found;
}
