"use strict";
// Memory of a rank over a step: bytes of each kind, one on top of the other, event by event.
const GIB = 2 ** 30;
const ESTIMATED = "estimated";
// A color of the page, or its lighter one.
const MEMORY_INKS = { [ESTIMATED]: "l7", weights: "c0", masters: "c2", moments: "c3", gradients: "c1", "batch and sums of losses": "c7", "gathered layers": "c5", "kept activations": "c4",
  "recomputed activations": "l4", "pipeline buffers": "c6", "logits and gradient of the head": "l0", "gradients of a layer": "l1", buckets: "l2", "communication buffers": "l5", temporaries: "l6" };
const memoryInk = (kind) => MEMORY_INKS[kind] ?? "l3";
const PART_INKS = { forward: "c0", loss: "c3", backward: "c1", transfer: "c6", update: "c7" };
const gibibytes = (bytes) => (bytes >= GIB ? `${fixed(bytes / GIB, 1)} GiB` : size(bytes));
const sumOf = (numbers) => numbers.reduce((sum, number) => sum + number, 0);

// A payload's memory of a rank, with its estimates as the lowest of the kinds.
function decodeMemory(memory) {
  const positions = memory.positions, outside = sumOf(Object.values(memory.outside));
  const kinds = [ESTIMATED, ...Object.keys(memory.bytes)], bytes = [positions.map(() => outside), ...Object.values(memory.bytes).map((text) => [...numbersOf(text)])];
  const at = (i) => bytes.map((series) => series[i]), total = (i) => sumOf(at(i));
  return { ...memory, kinds, bytes, at, total };
}

class MemoryView extends ChartView {
  constructor(rank, memory, capacity) {
    const places = memory.positions, sums = memory.bytes.map(() => places.map(() => 0));
    memory.bytes.forEach((series, k) => series.forEach((value, i) => { sums[k][i] = value + (k ? sums[k - 1][i] : 0); }));
    // The highest sum is painted first, so that those below it cover all but its own share.
    const order = memory.kinds.map((_, k) => memory.kinds.length - 1 - k);
    super({ id: `memory-${rank}`, title: `${t("memory_of_rank")} ${rank}`, x: "events" }, order.map((k) => ({ label: t(memory.kinds[k]), kind: memory.kinds[k], x: places, y: sums[k] })));
    this.memory = memory; this.capacity = capacity;
    this.line = make("p", { class: "soft under" }, t("hover_memory"));
    this.box.after(this.line);
    const used = memory.kinds.filter((_, k) => memory.bytes[k].some((value) => value > 0));
    this.line.after(legend([...used].reverse(), memoryInk));
  }

  get height() { return 280; }
  get printSize() { return { width: Math.min(700, this.box.clientWidth || 700), height: 240 }; }
  get highest() { return this.memory.total(this.memory.peak); }
  buttons() { return [this.wholeButton()]; }
  // The part of the step in which a point is.
  partOf(i) { const position = this.memory.positions[i]; let name = ""; for (const [part, begin] of this.memory.parts) if (begin <= position) name = part; return name; }
  kindsAt(i) {
    const rows = this.memory.at(i).map((bytes, k) => [this.memory.kinds[k], bytes]).filter((row) => row[1] > 0);
    return rows.sort((a, b) => b[1] - a[1]).map(([kind, bytes]) => `${t(kind)} ${gibibytes(bytes)}`).join(", ");
  }
  describeAt(i) {
    const part = this.partOf(i), place = `${t("event")} ${whole(this.memory.positions[i])}${part ? `, ${t(part)}` : ""}`;
    return `${place}: ${gibibytes(this.memory.total(i))}: ${this.kindsAt(i)}`;
  }
  sentence() {
    const missing = this.highest - this.capacity, fit = missing > 0 ? `${t("too_much")} ${gibibytes(missing)}` : `${t("to_spare")} ${gibibytes(-missing)}`;
    return `${t("peak")} ${gibibytes(this.highest)}, ${t("phase")} ${t(this.memory.phase)}: ${this.kindsAt(this.memory.peak)}; ${t("capacity")} ${gibibytes(this.capacity)}, ${fit}`;
  }
  table() {
    const { positions, peak, kinds } = this.memory, wanted = Math.min(positions.length, 25), chosen = new Set([peak]);
    for (let k = 0; k < wanted; k++) chosen.add(Math.round((k * (positions.length - 1)) / Math.max(1, wanted - 1)));
    const rows = [...chosen].sort((a, b) => a - b).map((i) => [whole(positions[i]), t(this.partOf(i) || "none"), ...this.memory.at(i).map((bytes) => fixed(bytes / GIB, 2)), fixed(this.memory.total(i) / GIB, 2)]);
    return tableOf([t("event"), t("part"), ...kinds.map((kind) => `${t(kind)}, GiB`), t("total")], rows, [true, false, ...kinds.map(() => true), true]);
  }

  draw() {
    this.fill();
    const range = this.plot && [this.plot.scales.x.min, this.plot.scales.x.max];
    if (this.plot) this.plot.destroy();
    const style = getComputedStyle(document.documentElement), color = (name) => style.getPropertyValue(name).trim();
    const axis = { stroke: color("--soft"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line") }, font: "12px system-ui, sans-serif" };
    const top = 1.14 * Math.max(this.capacity, this.highest), steps = uPlot.paths.stepped({ align: 1 });
    const areas = this.series.map((s) => ({ label: s.label, fill: color(`--${memoryInk(s.kind)}`), width: 0, paths: steps, points: { show: false } }));
    this.colors = { text: color("--fg"), ground: color("--bg"), limit: color("--warn"), edge: color("--line"), of: (part) => color(`--${PART_INKS[part] ?? "c7"}`) };
    this.plot = new uPlot({ width: this.box.clientWidth || 500, height: this.height, legend: { show: false }, padding: [6, 12, 0, 0], cursor: { y: false, drag: { x: true, y: false, dist: 5 }, points: { show: false } },
      scales: { x: { time: false }, y: { range: () => [0, top] } }, series: [{}, ...areas], hooks: { draw: [() => this.paint()], setCursor: [() => this.hover()] },
      axes: [{ ...axis, label: t("events"), labelSize: 16, labelFont: axis.font, size: 34 }, { ...axis, size: 58, incrs: [1, 2, 4, 5, 8, 10, 16, 20, 32, 40, 64, 100].flatMap((n) => [n * GIB, (n * GIB) / 1024]).sort((a, b) => a - b), values: (_, ticks) => ticks.map((bytes) => `${+(bytes / GIB).toPrecision(3)} GiB`) }] }, this.data, this.box);
    if (range && range[0] !== null) this.zoom(range);
  }
  hover() { const { idx, left } = this.plot.cursor; if (idx !== null && idx !== undefined && left >= 0) this.line.textContent = this.describeAt(idx); }

  paint() {
    const { ctx, bbox } = this.plot, ratio = devicePixelRatio || 1, { min, max } = this.plot.scales.x, right = bbox.left + bbox.width;
    const across = (position) => Math.min(Math.max(this.plot.valToPos(position, "x", true), bbox.left), right);
    ctx.save();
    ctx.beginPath(); ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height); ctx.clip();
    ctx.font = `${Math.round(11 * ratio)}px system-ui, sans-serif`; ctx.textBaseline = "middle"; ctx.lineWidth = ratio;
    this.paintParts(ctx, bbox, ratio, across, min, max);
    const limit = Math.round(this.plot.valToPos(this.capacity, "y", true)), high = this.plot.valToPos(this.highest, "y", true), peak = this.memory.positions[this.memory.peak], x = across(peak);
    ctx.strokeStyle = this.colors.limit; ctx.lineWidth = 2 * ratio; ctx.setLineDash([6 * ratio, 4 * ratio]);
    ctx.beginPath(); ctx.moveTo(bbox.left, limit); ctx.lineTo(right, limit); ctx.stroke();
    if (peak >= min && peak <= max) {
      ctx.strokeStyle = this.colors.text; ctx.setLineDash([2 * ratio, 3 * ratio]);
      ctx.beginPath(); ctx.moveTo(x, bbox.top + bbox.height); ctx.lineTo(x, high); ctx.stroke();
      ctx.fillStyle = this.colors.text; ctx.beginPath(); ctx.arc(x, high, 3.5 * ratio, 0, 2 * Math.PI); ctx.fill();
      this.write(ctx, `${t("peak")} ${gibibytes(this.highest)}`, x + (x > bbox.left + bbox.width / 2 ? -8 : 8) * ratio, high + 12 * ratio, x > bbox.left + bbox.width / 2 ? "right" : "left", ratio);
    }
    const isNear = Math.abs(limit - high) < 30 * ratio && high >= limit;
    this.write(ctx, `${payload.device} ${gibibytes(this.capacity)}`, bbox.left + 6 * ratio, limit + (isNear || limit > bbox.top + 40 * ratio ? -9 : 11) * ratio, "left", ratio);
    ctx.restore();
  }
  // Text on the ground of the page, so that it is read on every color.
  write(ctx, text, x, y, align, ratio) {
    const wide = ctx.measureText(text).width + 8 * ratio, left = align === "right" ? x - wide : x;
    ctx.globalAlpha = 0.88; ctx.fillStyle = this.colors.ground; ctx.fillRect(left, y - 8 * ratio, wide, 16 * ratio);
    ctx.globalAlpha = 1; ctx.fillStyle = this.colors.text; ctx.textAlign = "left"; ctx.fillText(text, left + 4 * ratio, y);
  }
  // A strip at the top: forward, loss, backward of each micro-batch, then the update.
  paintParts(ctx, bbox, ratio, across, min, max) {
    const strip = 15 * ratio;
    for (const [name, begin, end] of this.memory.parts) {
      if (end < min || begin > max) continue;
      const left = across(begin), wide = across(end) - left;
      ctx.fillStyle = this.colors.of(name); ctx.fillRect(left, bbox.top, Math.max(wide - ratio, 0.6), strip);
      const text = t(name);
      if (wide > ctx.measureText(text).width + 3 * ratio) { ctx.fillStyle = this.colors.ground; ctx.textAlign = "center"; ctx.fillText(text, left + wide / 2, bbox.top + strip / 2); }
    }
  }
}

// A chart for each chosen rank of the pipeline, by index.
class MemoryCharts {
  constructor() {
    this.memories = payload.memory.map(decodeMemory); this.views = new Map();
    this.box = make("div", { id: "memory-charts" });
  }
  // Returns the charts that were not there before, which are to be drawn.
  show(chosen) {
    for (const [index, view] of [...this.views]) {
      if (chosen.has(index)) continue;
      view.close(); this.views.delete(index); drawn.splice(drawn.indexOf(view), 1);
    }
    const added = [...chosen].filter((index) => !this.views.has(index) && this.memories[index]);
    for (const index of added) this.views.set(index, new MemoryView(payload.ranks[index].rank, this.memories[index], payload.capacity));
    const inOrder = [...this.views.keys()].sort((a, b) => a - b);
    this.box.replaceChildren(...inOrder.map((index) => this.views.get(index).figure));
    return added.map((index) => this.views.get(index));
  }
}
