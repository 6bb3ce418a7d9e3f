"use strict";
// The figures of runs, and which chart shows which.
// Accuracies and the like, which share an axis.
const inUnit = (y) => y.every((v) => v === null || (v >= 0 && v <= 1));
const CHARTS = [
  { id: "loss", names: /^loss$/ }, { id: "types", names: /^loss\// }, { id: "val", names: /^val\/.*_loss$/, points: true },
  { id: "eval", names: /^eval\//, points: true, keeps: inUnit }, { id: "eval_other", names: /^eval\//, points: true, keeps: (y) => !inUnit(y) },
  { id: "acc", names: /^(acc|val\/.*_acc)$/ }, { id: "lr", names: /^lr$/ }, { id: "norm", names: /^grad_norm$/ },
  { id: "speed", names: /^speed$/ }, { id: "tflops", names: /^tflops$/ }, { id: "memory", names: /^memory$/, factor: 2 ** -30 },
  { id: "progress", names: /^tokens\//, sums: true }, { id: "consumed", names: /^num_consumed_tokens$/ },
  { id: "seconds", names: /^(seconds|wait)$/ }, { id: "samples", names: /^num_samples_in_batch$/ }, { id: "scale", names: /^loss_scale$/, varies: true },
];

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
      if (chart.keeps && !chart.keeps(y)) continue;
      if (chart.varies && y.every((v) => v === y[0])) continue;
      const label = name.replace(/^(loss|tokens|eval)\//, "").replace(/^val\/(.*)_(loss|acc)$/, "$1");
      const short = { speed: "tokens/s", memory: "GiB", num_consumed_tokens: t("tokens"), num_samples_in_batch: t("c_samples"), seconds: t("seconds"), wait: t("wait"), lr: t("c_lr"), grad_norm: t("c_norm"), loss: t("loss") }[name] || label;
      found.push({ label: runs.length > 1 ? `${run.short} · ${short}` : short, x: figure.x, y });
    }
  }
  return found;
}
