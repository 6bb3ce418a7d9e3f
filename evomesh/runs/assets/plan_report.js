"use strict";
// The page of a prediction: a step in time, memory, groups and layouts, in two languages.
const PART_COLORS = { "matrix products": 0, attention: 3, elementwise: 4, "waiting for collectives": 1, "waiting for other stages": 6, "reducing, updating, gathering": 7 };
const AXIS_COLORS = { tp: 0, wp: 5, pp: 1, dp: 2, zero: 3, replica: 4, ends: 6, world: 7 };
const note = (text) => make("p", { class: "soft" }, text);
// A color by its number, or by its name such as "l4".
const inkOf = (color) => (typeof color === "number" ? `var(--c${color})` : `var(--${color})`);
const swatch = (color) => make("span", { class: "swatch", style: `background:${inkOf(color)}` });
const named = (color, text) => make("span", {}, swatch(color), text);
const size = (bytes) => (bytes >= GIB ? `${fixed(bytes / GIB, 2)} GiB` : bytes >= 2 ** 20 ? `${fixed(bytes / 2 ** 20, 1)} MiB` : `${fixed(bytes / 1024, 1)} KiB`);

function cards(rows) {
  return make("dl", { class: "cards" }, ...rows.filter((row) => row[1] !== null && row[1] !== undefined).map(([key, value]) => make("div", {}, make("dt", {}, t(key)), make("dd", {}, value))));
}
// One bar of parts side by side; "full" is what the whole width stands for, "mark" a limit to draw.
function stackedBar(parts, full, color, mark) {
  const label = Object.entries(parts).map(([name, value]) => `${t(name)} ${percent(value / full)}`).join(", ");
  const pieces = Object.entries(parts).map(([name, value]) => make("span", { style: `background:${inkOf(color(name))};width:${(100 * value) / full}%`, title: t(name) }));
  return make("div", { class: "bar stacked", role: "img", "aria-label": label }, ...pieces, mark ? make("i", { class: "mark", style: `left:${(100 * mark) / full}%` }) : null);
}
function legend(names, color) { return make("p", { class: "soft legend" }, ...names.map((name) => named(color(name), t(name)))); }
function costOf(speed) { return payload.price === null ? null : fixed((1e9 / speed / 3600) * payload.price, 2); }

function summary() {
  const rows = [["gpus", `${whole(payload.gpus)} × ${payload.device}`], ["parameters", payload.parameters ? short(payload.parameters) : null], ["tokens", whole(payload.tokens)], ["step_time", `${fixed(payload.seconds, 3)} s`], ["speed", whole(Math.round(payload.speed))],
    ["micro_batches", whole(payload.micro_batches)], ["ranks_shown", whole(payload.ranks.length)], ["cost", costOf(payload.speed)]];
  return section("summary", cards(rows));
}
function parts() {
  const color = (name) => PART_COLORS[name] ?? 7, names = Object.keys(payload.parts);
  const rows = names.map((name) => [named(color(name), t(name)), fixed(payload.parts[name], 3), percent(payload.parts[name] / payload.seconds)]);
  return section("parts", stackedBar(payload.parts, payload.seconds, color), tableOf([t("part"), t("seconds"), t("of_step")], rows, [false, true, true]));
}
function timeline(views) {
  const ranks = payload.ranks.map(decodeRank), step = payload.seconds * 1000, linked = [];
  const chosen = new Set(ranks.length > 2 ? [0] : ranks.map((_, i) => i));
  const rows = () => { const shown = ranks.filter((_, i) => chosen.has(i)); return shown.flatMap((rank) => rank.streams.map((stream) => new StreamRow(rank, stream, shown.length === 1))); };
  const overview = new TimelineView("ranks", ranks.map((rank) => new RankRow(rank)), step, linked), streams = new TimelineView("streams", rows(), step, linked), charts = new MemoryCharts();
  const boxes = ranks.map((rank, i) => {
    const box = make("input", { type: "checkbox", value: String(i), ...(chosen.has(i) ? { checked: "" } : {}) });
    box.onchange = () => { if (box.checked) chosen.add(i); else chosen.delete(i); streams.show(rows()); for (const view of charts.show(chosen)) view.draw(); };
    return make("label", {}, box, ` ${rank.number}`);
  });
  const isPipeline = ranks.length > 1, names = [...new Set(payload.ranks.flatMap((rank) => rank.parts.flatMap((part) => part.names)))];
  views.push(overview, streams, ...charts.show(chosen));
  const kinds = isPipeline ? make("p", { class: "soft legend" }, named(0, t("forward")), named(1, t("backward")), named(7, t("kind_U"))) : null;
  return section("timeline", note(t("timeline_note")), overview.figure, kinds, isPipeline ? make("fieldset", { class: "choices" }, make("legend", {}, t("streams_of")), ...boxes) : null, streams.figure,
    make("p", { class: "soft legend" }, ...names.map((name) => named(colorOf(name), whatOf(name)))), payload.memory.length ? note(t("memory_over_note")) : null, charts.box);
}
function memory() {
  if (!payload.memory.length) return section("memory", note(t("no_memory")));
  const memories = payload.memory.map(decodeMemory), peaks = memories.map((one) => Object.fromEntries(one.at(one.peak).map((bytes, k) => [one.kinds[k], bytes])));
  const totals = memories.map((one) => one.total(one.peak)), full = Math.max(payload.capacity, ...totals) * 1.01, number = (i) => `${payload.ranks[i].rank}`;
  const kinds = Object.keys(MEMORY_INKS).filter((kind) => peaks.some((peak) => peak[kind])), present = (peak) => kinds.filter((kind) => peak[kind]);
  const barOf = (peak) => stackedBar(Object.fromEntries(present(peak).map((kind) => [kind, peak[kind]])), full, memoryInk, payload.capacity);
  const bars = peaks.map((peak, i) => [number(i), barOf(peak), fixed(totals[i] / GIB, 1), t(memories[i].phase)]);
  const rows = peaks.map((peak, i) => [number(i), ...kinds.map((kind) => fixed((peak[kind] || 0) / GIB, 2)), fixed(totals[i] / GIB, 2)]);
  const details = make("details", {}, make("summary", {}, `${t("table")}: ${t("memory")}`), tableOf([t("rank"), ...kinds.map((kind) => `${t(kind)}, GiB`), t("total")], rows, [true, ...kinds.map(() => true), true]));
  return section("memory", note(t("memory_note")), legend(kinds, memoryInk), tableOf([t("rank"), `0 – ${fixed(full / GIB, 0)} GiB`, `${t("total")}, GiB`, t("phase")], bars, [true, false, true]), details);
}

// The ranks of an axis with a rank: those of one arithmetic sequence.
function membersOf(axis, rank) {
  const first = rank - (Math.floor(rank / axis.distance) % axis.size) * axis.distance;
  return Array.from({ length: axis.size }, (_, i) => first + i * axis.distance);
}
function listed(members) { return members.length > 9 ? `${members.slice(0, 4).join(", ")}, … ${members[members.length - 1]}` : members.join(", "); }
function nodesOf(members) { return new Set(members.map((member) => Math.floor(member / payload.per_node))).size; }
function groupPicture(rank) {
  const axes = payload.groups.map((axis) => ({ ...axis, members: new Set(membersOf(axis, rank)) })), all = Math.ceil(payload.gpus / payload.per_node);
  const wanted = new Set(axes.flatMap((axis) => [...axis.members].map((member) => Math.floor(member / payload.per_node))));
  const shown = Array.from({ length: all }, (_, i) => i).filter((node) => all <= 16 || wanted.has(node)).slice(0, 32);
  const cell = (member) => {
    const own = axes.filter((axis) => axis.members.has(member)), stripes = member === rank ? [] : own.map((axis) => make("i", { style: `background:var(--c${AXIS_COLORS[axis.name] ?? 7})` }));
    return make("span", { class: `cell${member === rank ? " self" : ""}`, title: member === rank ? "" : own.map((axis) => t(axis.name)).join(", "), "data-rank": String(member) }, String(member), ...stripes);
  };
  const frames = shown.map((node) => make("div", { class: "node" }, make("span", { class: "soft" }, `${t("node")} ${node}`), make("div", { class: "cells" }, ...Array.from({ length: Math.min(payload.per_node, payload.gpus - node * payload.per_node) }, (_, i) => cell(node * payload.per_node + i)))));
  const label = axes.map((axis) => `${t(axis.name)}: ${listed([...axis.members])}`).join("; ");
  return make("div", {}, make("div", { class: "nodes", role: "img", "aria-label": label }, ...frames), shown.length < all ? note(`+ ${whole(all - shown.length)} ${t("more_nodes")}`) : null);
}
function groupTables(rank) {
  const traffic = payload.traffic[Math.floor(rank / (payload.gpus / payload.ranks.length))];
  const link = (nodes) => t(nodes > 1 ? "between_nodes" : "in_node");
  const groups = payload.groups.map((axis) => { const members = membersOf(axis, rank), nodes = nodesOf(members); return [named(AXIS_COLORS[axis.name] ?? 7, `${axis.name} (${t(axis.name)})`), whole(axis.count), whole(axis.size), whole(axis.distance), whole(nodes), link(nodes), listed(members)]; });
  const calls = traffic.map((row) => [named(AXIS_COLORS[row.axis] ?? 7, row.axis), row.operation, whole(row.calls), size(row.nbytes), fixed(row.seconds, 3)]);
  return make("div", {}, tableOf(["axis", "group_count", "size", "distance", "nodes", "link", "members"].map(t), groups, [false, true, true, true, true]),
    calls.length ? tableOf(["axis", "operation", "calls", "bytes", "busy_seconds"].map(t), calls, [false, false, true, true, true]) : null);
}
function groups() {
  if (!payload.groups.length) return section("groups", note(t("one_rank")));
  const input = make("input", { type: "number", min: "0", max: String(payload.gpus - 1), value: "0", id: "chosen-rank" }), box = make("div");
  const show = () => { const rank = Math.min(Math.max(0, Math.round(Number(input.value) || 0)), payload.gpus - 1); box.replaceChildren(groupPicture(rank), groupTables(rank)); };
  input.oninput = show;
  box.onclick = (event) => { const cell = event.target.closest?.(".cell"); if (cell) { input.value = cell.dataset.rank; show(); } };
  show();
  return section("groups", note(t("groups_note")), make("p", {}, make("label", { for: "chosen-rank" }, `${t("choose_rank")} `), input), legend(payload.groups.map((axis) => axis.name), (name) => AXIS_COLORS[name] ?? 7), box);
}
function layouts() {
  if (payload.layouts === null) return null;
  if (!payload.layouts.length) return section("layouts", note(t("no_layouts")));
  const color = (name) => PART_COLORS[name] ?? 7, per = (row) => 1e6 / row.speed, full = Math.max(...payload.layouts.map(per));
  const scaled = (row) => Object.fromEntries(Object.entries(row.parts).map(([name, value]) => [name, (value / row.seconds) * per(row)]));
  const rows = payload.layouts.map((row, i) => [i + 1, row.layout, stackedBar(scaled(row), full, color), fixed(per(row), 1), whole(Math.round(row.speed)), fixed(row.peak / GIB, 1), ...(payload.price === null ? [] : [costOf(row.speed)])]);
  const heads = ["", t("layout"), "", t("per_million"), t("speed"), "GiB", ...(payload.price === null ? [] : [t("cost")])];
  const names = [...new Set(payload.layouts.flatMap((row) => Object.keys(row.parts)))];
  return section("layouts", note(t("layouts_note")), legend(names, color), tableOf(heads, rows, [true, false, false, true, true, true, true]));
}
function build() {
  startPage();
  document.title = `${payload.name} – evomesh`;
  document.getElementById("title").textContent = `${t("plan_report")}: ${payload.name}`;
  document.getElementById("subtitle").textContent = `${whole(payload.gpus)} × ${payload.device} · ${t("written")} ${date(payload.written)}`;
  const views = [];
  showParts([summary(), parts(), timeline(views), memory(), groups(), layouts()].filter(Boolean), t("plan_report"));
  drawNear(views);
}
applyTheme();
build();
document.documentElement.dataset.ready = "1";
