"use strict";
// What ranks and streams do when: rows of boxes on one axis of time, in milliseconds, drawn on a chart of the library.
const KIND_COLORS = { "matrix products": 0, attention: 3, elementwise: 4, optimizer: 7, F: 0, B: 1, I: 1, W: 4, M: 0, U: 7 };
const OPERATION_COLORS = { all_gather: 1, reduce_scatter: 5, all_reduce: 6, send: 2, recv: 2, all_to_all: 5, broadcast: 6, reduce: 6 };
const colorOf = (what) => KIND_COLORS[what] ?? OPERATION_COLORS[what.split(" ")[0]] ?? 7;
const milliseconds = (value) => `${value.toLocaleString("en-US", { maximumFractionDigits: value < 100 ? 3 : 1 })} ms`;
const PLACE = { part: 0, kind: 1, stage: 2, batch: 3, start: 4, end: 5, offset: 6 };
const nameOfKind = (place) => (place[1] === "U" ? t("end_of_step") : place[1] === "M" ? `${t("micro_batch")} ${place[3]}` : `${t(`kind_${place[1]}`)} ${t("micro_batch")} ${place[3]}, ${t("stage")} ${place[2]}`);

// Numbers of a payload's rank, in milliseconds.
function decodeRank(rank) {
  const scaled = (text) => numbersOf(text).map((value) => value * 1000);
  const parts = rank.parts.map((part) => Object.fromEntries(Object.entries(part.streams).map(([stream, spans]) => {
    const decoded = { starts: scaled(spans.starts), ends: scaled(spans.ends), whats: spans.whats.map((number) => part.names[number]) };
    decoded.busy = decoded.starts.reduce((sum, start, i) => sum + decoded.ends[i] - start, 0);
    return [stream, decoded];
  })));
  const placed = rank.placed.map((place) => place.map((value, i) => (i >= PLACE.start ? value * 1000 : value)));
  const streams = [...new Set(parts.flatMap((part) => Object.keys(part)))];
  const order = (stream) => (stream === "compute" ? 0 : stream.startsWith("stream") ? 1 : 2);
  streams.sort((a, b) => order(a) - order(b) || (a < b ? -1 : 1));
  return { number: rank.rank, parts, placed, streams };
}
// Index of the first number that is above a limit; the numbers ascend.
function firstAbove(numbers, limit, low = 0) {
  let high = numbers.length;
  while (low < high) { const middle = (low + high) >> 1; if (numbers[middle] > limit) high = middle; else low = middle + 1; }
  return low;
}

// What a rank computes: a box for each micro-batch of each stage.
class RankRow {
  constructor(rank) { this.rank = rank; this.label = `${t("rank")} ${rank.number}`; }
  // Calls "visit" with the boxes between two times, until it returns true.
  each(from, to, visit) {
    for (const place of this.rank.placed) {
      if (place[PLACE.end] < from || place[PLACE.start] > to) continue;
      const short_ = place[1] === "U" ? "" : String(place[3]);
      if (visit(place[PLACE.start], place[PLACE.end], place[1], nameOfKind(place), short_) === true) return;
    }
  }
  busy() { return this.rank.placed.reduce((sum, place) => sum + place[PLACE.end] - place[PLACE.start], 0); }
}

// What one stream of a rank does.
class StreamRow {
  constructor(rank, stream, isOnly) {
    this.rank = rank; this.stream = stream;
    this.name = stream === "compute" ? t("compute") : stream.startsWith("stream") ? `${t("copies")} ${stream.slice(7)}` : stream;
    this.label = isOnly ? this.name : `${rank.number} ${this.name}`;
  }
  // As of a RankRow; "visit" may also return a time before which it needs no more boxes.
  each(from, to, visit) {
    for (const place of this.rank.placed) {
      const spans = this.rank.parts[place[PLACE.part]][this.stream];
      if (!spans) continue;
      const [, kind, , , start, end, offset] = place, shift = start - offset, cut = offset + end - start;
      // Parts in pieces end with the piece; others also have what they send afterwards.
      const isWhole = kind === "F" || kind === "B", last = spans.ends[spans.ends.length - 1];
      if (start > to || (isWhole ? shift + last : end) < from) continue;
      let i = firstAbove(spans.ends, Math.max(offset + 1e-4, from - shift));
      while (i < spans.ends.length && spans.starts[i] + shift <= to) {
        if (!isWhole && spans.starts[i] >= cut) break;
        const first = Math.max(spans.starts[i], offset) + shift, stop = (isWhole ? spans.ends[i] : Math.min(spans.ends[i], cut)) + shift;
        const answer = visit(first, stop, spans.whats[i], whatOf(spans.whats[i]), "");
        if (answer === true) return;
        i = answer > stop ? firstAbove(spans.ends, answer - shift, i + 1) : i + 1;
      }
    }
  }
  busy() {
    let sum = 0;
    for (const place of this.rank.placed) {
      const spans = this.rank.parts[place[PLACE.part]][this.stream];
      if (spans && (place[1] === "F" || place[1] === "B")) sum += spans.busy;
      else if (spans) new StreamRow({ ...this.rank, placed: [place] }, this.stream, true).each(-1, Infinity, (start, end) => { sum += end - start; });
    }
    return sum;
  }
}
const whatOf = (what) => (WORDS[what] ? t(what) : what);

class TimelineView extends ChartView {
  // "step" is the end of the time axis; "linked" are other views that show the same stretch of time.
  constructor(id, rows, step, linked) {
    super({ id, x: "milliseconds" }, [{ label: "", x: [0, step], y: [null, null] }]);
    this.rows = rows; this.step = step; this.linked = linked; this.row = 0; this.chosen = null;
    this.range = [0, step];
    this.line = make("p", { class: "soft under" }, t("hover"));
    this.box.after(this.line);
    linked.push(this);
    this.box.style.minHeight = `${this.height}px`;
  }

  get keysText() { return t("timeline_keys"); }
  get height() { return 58 + (this.rows || []).length * (this.rows?.length > 12 ? 20 : 26); }
  get printSize() { return { width: Math.min(700, this.box.clientWidth || 700), height: this.height }; }
  buttons() {
    const button = (sign, name, action) => { const one = make("button", { type: "button", "aria-label": t(name), title: t(name) }, sign); one.onclick = action; return one; };
    return [button("◀", "earlier", () => this.pan(-0.5)), button("▶", "later", () => this.pan(0.5)), button("+", "nearer", () => this.magnify(0.5)), button("−", "farther", () => this.magnify(2)), this.wholeButton()];
  }
  sentence() {
    const shares = this.rows.map((row) => `${row.label} ${percent(row.busy() / this.step)}`);
    return `${t("step_of")} ${milliseconds(this.step)}. ${t("busy")}: ${shares.join(", ")}`;
  }
  table() {
    const rows = [];
    for (const row of this.rows) {
      const found = new Map();
      row.each(-1, Infinity, (start, end, what) => { const name = whatOf(WORDS[`kind_${what}`] ? `kind_${what}` : what), sum = found.get(name) || [0, 0]; found.set(name, [sum[0] + 1, sum[1] + end - start]); });
      for (const [name, [count, sum]] of found) rows.push([row.label, name, whole(count), fixed(sum, 3), percent(sum / this.step)]);
    }
    return tableOf([t("row"), t("what"), t("boxes"), "ms", t("of_step")], rows, [false, false, true, true, true]);
  }

  draw() {
    this.fill();
    if (this.plot) this.plot.destroy();
    const style = getComputedStyle(document.documentElement), color = (name) => style.getPropertyValue(name).trim();
    const axis = { stroke: color("--soft"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line") }, font: "12px system-ui, sans-serif" };
    const count = this.rows.length, width = this.box.clientWidth || 500, [min, max] = this.range;
    this.isDrawing = true;
    this.colors = { line: color("--fg"), text: color("--bg"), of: (what) => color(`--c${colorOf(what)}`) };
    const labels = { ...axis, grid: { show: false }, ticks: { show: false }, gap: 4, size: width < 600 ? 118 : 170, splits: () => this.rows.map((_, i) => count - i - 0.5), values: () => this.rows.map((row) => row.label) };
    this.plot = new uPlot({ width, height: this.height, legend: { show: false }, padding: [6, 12, 0, 0],
      cursor: { y: false, drag: { x: true, y: false, dist: 5 }, points: { show: false }, bind: { mousedown: (plot, _, handler) => (event) => { if (event.shiftKey) this.grab(event); else handler(event); return null; } } },
      scales: { x: { time: false, min, max }, y: { range: () => [0, count] } },
      series: [{}, {}], axes: [{ ...axis, values: (_, ticks) => ticks.map((value) => `${+value.toPrecision(7)}`), label: t("milliseconds"), labelSize: 18, labelFont: axis.font, labelGap: 0, size: 32 }, labels],
      hooks: { draw: [() => this.paint()], setCursor: [() => this.hover()], setScale: [(plot, name) => { if (name === "x") this.follow(); }] } }, this.data, this.box);
    this.isDrawing = false;
    this.plot.setScale("x", { min, max });
    this.plot.over.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
  }

  paint() {
    const { ctx, bbox } = this.plot, { min, max } = this.plot.scales.x, height = bbox.height / this.rows.length, gap = Math.max(1, height * 0.12), perMs = bbox.width / (max - min);
    const at = (time) => bbox.left + (time - min) * perMs, palette = {};
    ctx.save();
    ctx.beginPath(); ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height); ctx.clip();
    ctx.font = `${Math.round(height * 0.5)}px system-ui, sans-serif`; ctx.textAlign = "center"; ctx.textBaseline = "middle";
    this.rows.forEach((row, i) => {
      const top = bbox.top + i * height + gap, tall = height - 2 * gap;
      let painted = -Infinity;
      row.each(min, max, (start, end, what, _, text) => {
        const left = Math.max(at(start), bbox.left), right = Math.min(at(end), bbox.left + bbox.width), wide = right - left;
        ctx.fillStyle = palette[what] ??= this.colors.of(what);
        // Boxes side by side need a border between them, narrow ones have no room for one.
        ctx.fillRect(left, top, Math.max(wide > 12 ? wide - 1 : wide, 0.6), tall);
        if (text && wide > 4 + 6 * text.length) { ctx.fillStyle = this.colors.text; ctx.fillText(text, (left + right) / 2, top + tall / 2); }
        painted = Math.max(painted, right);
        return min + (painted + 0.5 - bbox.left) / perMs;
      });
    });
    if (this.chosen) { ctx.strokeStyle = this.colors.line; ctx.lineWidth = 2; ctx.strokeRect(at(this.chosen[0]), bbox.top + this.row * height + gap, Math.max((this.chosen[1] - this.chosen[0]) * perMs, 2), height - 2 * gap); }
    ctx.restore();
  }

  // The first box of a row that ends after a time.
  boxAfter(row, time, latest = Infinity) {
    let found = null;
    row.each(time, latest, (start, end, what, name) => { if (end <= time + 1e-6) return undefined; found = [start, end, what, name]; return true; });
    return found;
  }
  describe(row, box) { return `${row.label}: ${box[3]}, ${milliseconds(box[0])} – ${milliseconds(box[1])} (${milliseconds(box[1] - box[0])})`; }
  hover() {
    const { left, top } = this.plot.cursor;
    if (left < 0 || top < 0) return;
    const row = this.rows[Math.min(this.rows.length - 1, Math.floor((top / this.plot.over.clientHeight) * this.rows.length))], time = this.plot.posToVal(left, "x");
    const box = row && this.boxAfter(row, time, time);
    this.line.textContent = box ? this.describe(row, box) : `${row ? row.label : ""}: ${t("waits")}, ${milliseconds(time)}`;
  }

  follow() {
    if (this.isDrawing) return;
    const { min, max } = this.plot.scales.x;
    this.range = [min, max];
    for (const view of this.linked) {
      if (view === this) continue;
      const [other, end] = view.range;
      view.range = [min, max];
      if (view.plot && (other !== min || end !== max)) view.plot.setScale("x", { min, max });
    }
  }
  zoom(range) {
    let [min, max] = range || [0, this.step];
    const span = Math.min(Math.max(max - min, 1e-4), this.step);
    min = Math.max(0, Math.min(min, this.step - span));
    if (this.plot) this.plot.setScale("x", { min, max: min + span });
  }
  pan(share) { const [min, max] = this.range, by = (max - min) * share; this.zoom([min + by, max + by]); }
  magnify(factor, around = (this.range[0] + this.range[1]) / 2) { const [min, max] = this.range; this.zoom([around - (around - min) * factor, around + (max - around) * factor]); }
  wheel(event) {
    if (event.ctrlKey || event.metaKey) { event.preventDefault(); this.magnify(Math.exp(event.deltaY / 300), this.plot.posToVal(event.offsetX, "x")); return; }
    const sideways = event.shiftKey ? event.deltaY || event.deltaX : event.deltaX;
    if (Math.abs(sideways) > Math.abs(event.shiftKey ? 0 : event.deltaY)) { event.preventDefault(); this.pan(sideways / this.plot.over.clientWidth); }
  }
  // Shift and drag: the time axis moves with the pointer.
  grab(event) {
    const from = event.clientX, [min, max] = this.range, perPixel = (max - min) / this.plot.over.clientWidth;
    const move = (moved) => { const by = (from - moved.clientX) * perPixel; this.zoom([min + by, max + by]); };
    const drop = () => { removeEventListener("mousemove", move); removeEventListener("mouseup", drop); };
    addEventListener("mousemove", move); addEventListener("mouseup", drop);
    event.preventDefault();
  }

  key(event) {
    if (!this.plot || event.target !== this.box) return;
    const [min, max] = this.range, middle = this.chosen ? (this.chosen[0] + this.chosen[1]) / 2 : (min + max) / 2, rows = this.rows.length;
    if (event.key === "+" || event.key === "=") this.magnify(0.5, middle);
    else if (event.key === "-") this.magnify(2, middle);
    else if (event.key === "0") this.zoom(null);
    else if (event.key === "PageDown") this.pan(0.5);
    else if (event.key === "PageUp") this.pan(-0.5);
    else if (event.key === "ArrowRight") this.choose(this.boxAfter(this.rows[this.row], this.chosen ? this.chosen[1] : min));
    else if (event.key === "ArrowLeft") this.choose(this.boxBefore(this.chosen ? this.chosen[0] : min));
    else if (event.key === "Home") this.choose(this.boxAfter(this.rows[this.row], -1));
    else if (event.key === "End") this.choose(this.boxBefore(Infinity));
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") { this.row = (this.row + (event.key === "ArrowDown" ? 1 : rows - 1)) % rows; this.choose(this.boxAfter(this.rows[this.row], this.chosen ? this.chosen[0] : min)); }
    else return;
    event.preventDefault();
  }
  boxBefore(time) {
    let found = null;
    this.rows[this.row].each(-1, time, (start, end, what, name) => { if (start < time - 1e-6) found = [start, end, what, name]; });
    return found;
  }
  choose(box) {
    const row = this.rows[this.row];
    if (!box) { document.getElementById("spoken").textContent = `${row.label}: ${t("none")}`; return; }
    this.chosen = box;
    const [min, max] = this.range, span = max - min;
    if (box[0] < min || box[1] > max) this.zoom([(box[0] + box[1] - span) / 2, (box[0] + box[1] + span) / 2]); else this.plot.redraw();
    this.line.textContent = document.getElementById("spoken").textContent = this.describe(row, box);
  }

  show(rows) {
    this.rows = rows; this.row = 0; this.chosen = null; this.isFilled = false;
    this.details.open = false; delete this.details.dataset.made; this.details.querySelector(".scroll")?.remove();
    this.box.style.minHeight = `${this.height}px`;
    if (this.plot) this.draw();
  }
}
