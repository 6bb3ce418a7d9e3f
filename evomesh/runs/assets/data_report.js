"use strict";
// The page of a data folder: its figures as charts and tables, in two languages.
const unit = () => t(payload.unit);
const rounded = (value) => (typeof value === "number" ? (100 * value).toPrecision(3) : "–");
const stop = () => (language === "zh" ? "。" : ".");
const note = (...parts) => make("p", { class: "soft" }, parts.join(" "));
// Of powers of two: 512–1023, then 1k–2k (1,024 to 2,047).
function binName(start) {
  if (start < 2) return String(start);
  if (start < 1024) return `${start}–${2 * start - 1}`;
  const size = start < 2 ** 20 ? [2 ** 10, "k"] : [2 ** 20, "M"];
  return `${start / size[0]}${size[1]}–${(2 * start) / size[0]}${size[1]}`;
}

function cards(rows) {
  return make("dl", { class: "cards" }, ...rows.filter((row) => row[1] !== null && row[1] !== undefined).map(([key, value]) => make("div", {}, make("dt", {}, t(key)), make("dd", {}, value))));
}
function readNote() {
  const read = payload.read;
  if (read.is_complete) return note(t("read_all"));
  const whole_ = payload.unit === "tokens", share = read.share === null ? "" : ` (${percent(read.share)})`;
  const counts = whole_ ? `${whole(read.documents)} / ${whole(read.of_documents)} ${t("documents_word")}${share}` : `${whole(read.documents)} ${t("documents_word")}`;
  return make("p", { class: "note warn" }, `${t(whole_ ? "read_part" : "read_first")} ${counts}${stop()}`);
}
function summary() {
  const read = payload.read, tokens = payload.tokens || {}, fertility = tokens.fertility;
  const rows = [["documents", whole(read.of_documents)], [payload.unit, short(read.of_units)], ["files_word", whole(payload.files.length)], ["types_word", whole(payload.types.length)],
    ["exact", percent(payload.exact.repeats / (payload.exact.looked_at || 1))], ["near", percent(payload.near.repeats / (payload.near.looked_at || 1))],
    ["fertility", fertility ? fixed(fertility.value, 2) : null], ["unused", tokens.vocab_size ? `${percent(tokens.unused / tokens.vocab_size)}` : null], ["unknown_share", tokens.unknown === undefined ? null : percent(tokens.unknown)]];
  const notes = [readNote()];
  if (!payload.tokenizer && payload.unit === "tokens") notes.push(make("p", { class: "note warn" }, t("no_tokenizer")));
  if (payload.other_tokenizer?.length) notes.push(make("p", { class: "note warn" }, `${t("other_tokenizer")} ${payload.other_tokenizer.join(", ")}`));
  return section("summary", cards(rows), ...notes);
}
function lengthViews() {
  const bins = payload.lengths, first = bins.documents.findIndex((count) => count > 0);
  if (first < 0) return [];
  const shown = (values) => values.slice(first), names = shown(bins.starts).map(binName), x = names.map((_, i) => i);
  const chart = (id) => ({ id, labels: names, x: "length", bars: true }), sum = (values) => values.reduce((a, b) => a + b, 0) || 1;
  const shares = (values) => shown(values).map((value) => (100 * value) / sum(values));
  return [new ChartView(chart("lengths"), [{ label: t("documents"), x, y: shown(bins.documents) }]),
    new ChartView({ id: "length_units", labels: names, x: "length" }, [{ label: t("document_share"), x, y: shares(bins.documents) }, { label: `${unit()}, %`, x, y: shares(bins.units) }])];
}
function types() {
  const heads = [t("type"), t("documents"), unit(), t("share"), t("mean"), t("shortest"), "5 %", "25 %", t("median"), "75 %", "95 %", t("longest")];
  const rows = payload.types.map((row) => [row.type, whole(row.documents), whole(row.units), percent(row.share), fixed(row.mean), ...(row.quantiles || []).map(whole)]);
  return section("types", tableOf(heads, rows, heads.map((_, i) => i > 0)));
}
function duplicates(id) {
  const found = payload[id], near = id === "near";
  const parts = [note(t(near ? "near_note" : "exact_note"), near ? `${t("shingle_of")} ${t(payload.similar_unit)}${stop()}` : "")];
  if (found.share < 1) parts.push(make("p", { class: "note warn" }, `${t(near ? "part_of_near" : "part_of_hash")} ${percent(found.share)}${stop()}`));
  if (!payload.read.is_complete) parts.push(make("p", { class: "note warn" }, t("among_read")));
  parts.push(cards([["looked_at", whole(found.looked_at)], ["groups", whole(found.groups)], ["repeats", whole(found.repeats)], ["repeated", `${percent(found.repeated_units / (found.looked_at_units || 1))} ${t(payload.similar_unit)}`]]));
  if (!found.groups) return section(id, ...parts, note(t("no_groups")));
  const places = (row) => make("div", {}, ...row.places.map((place) => make("div", { class: "place" }, place)), row.size > row.places.length ? make("div", {}, `… ${whole(row.size - row.places.length)} ${t("more")}`) : null);
  const rows = found.rows.map((row) => [whole(row.size), whole(row.units), places(row), make("span", { class: "text" }, row.text)]);
  return section(id, ...parts, tableOf([t("copies"), `${t(payload.similar_unit)}`, t("places"), t("text")], rows, [true, true]));
}
function shareTable(rows, name, count) {
  const bar = (row, i) => make("span", { class: "share" }, make("span", { class: "fill", style: `width:${100 * row.share}%;background:var(--c${i % 8})` }));
  return tableOf([t(name), t(count), t("share"), ""], rows.map((row, i) => [row[name], whole(row[count]), percent(row.share), bar(row, i)]), [false, true, true]);
}
function scripts() { return payload.scripts.length ? section("scripts", note(`${t("script_note")} ${whole(payload.script_texts)} ${language === "zh" ? "" : t("texts")}${stop()}`), shareTable(payload.scripts, "script", "characters")) : null; }
function languages() {
  if (!payload.scripts.length) return null;
  if (!payload.has_languages) return section("languages", note(t("no_languages")));
  let names = null;
  try { names = new Intl.DisplayNames([language === "zh" ? "zh-CN" : "en"], { type: "language" }); } catch { /* codes will do */ }
  // A code that has no name is its own name.
  const nameOf = (code) => { const name = names ? names.of(code) : code; return name === code ? code : `${name} (${code})`; };
  const named = payload.languages.map((row) => ({ ...row, language: nameOf(row.language) }));
  return section("languages", note(t("language_note")), shareTable(named, "language", "texts"));
}
function tokenCounts(views) {
  const counts = payload.tokens;
  if (!counts || !counts.total) return null;
  const view = new ChartView({ id: "curve", x: "rank", logX: true }, [{ label: t("occurrences"), x: counts.curve.rank, y: counts.curve.count }]);
  view.log = true;
  views.push(view);
  const fertility = counts.fertility, rows = [["vocabulary", counts.vocab_size ? whole(counts.vocab_size) : null], ["used", whole(counts.distinct)],
    ["unused", counts.vocab_size ? `${whole(counts.unused)} (${percent(counts.unused / counts.vocab_size)})` : null], ["unknown_share", counts.unknown === undefined ? null : percent(counts.unknown)],
    ["masked", percent(counts.masked)], ["outside", counts.outside ? whole(counts.outside) : null], ["fertility", fertility ? `${fixed(fertility.value, 2)} (${t(fertility.is_exact ? "exact_word" : "decoded_note")})` : null]];
  const top = counts.top.map((row) => [row.id, ...(row.name === undefined ? [] : [make("code", {}, row.name)]), whole(row.count), `${rounded(row.share)} %`]);
  const heads = counts.vocab_size ? ["id", "token", "count", "share"] : ["id", "count", "share"];
  const parts = [cards(rows), make("div", { class: "charts" }, view.figure, tableOf(heads.map(t), top, counts.vocab_size ? [true, false, true, true] : [true, true, true]))];
  if (counts.unused) parts.push(make("details", {}, make("summary", {}, t("unused_list")), make("p", { class: "tokens" }, ...counts.unused_shown.map((name) => make("code", {}, name || "–")))));
  return section("token_counts", ...parts);
}
function packing(views) {
  const rows = payload.packing;
  if (!rows) return null;
  const names = rows.map((row) => (row.seq_len % 1024 ? String(row.seq_len) : `${row.seq_len / 1024}k`)), x = names.map((_, i) => i);
  const positions = (row) => row.packs * row.pack || 1, tokens = (row) => row.tokens || 1;
  const line = (key, share) => ({ label: t(key), x, y: rows.map((row) => 100 * share(row)) });
  const view = new ChartView({ id: "packing", labels: names, x: "seq_len" }, [line("dropped", (row) => row.dropped / tokens(row)), line("padding", (row) => row.padding / positions(row)), line("split_tokens", (row) => row.split_tokens / tokens(row))]);
  views.push(view);
  const heads = ["seq_len", "pack", "packs", "short_documents", "dropped", "padding", "split", "split_tokens", ""].map(t), both = (count, total) => `${whole(count)} (${percent(count / (total || 1))})`;
  const cells = rows.map((row) => [whole(row.seq_len), whole(row.pack), whole(row.packs), both(row.short, row.tokens), both(row.dropped, row.tokens), both(row.padding, row.packs * row.pack), both(row.split, row.documents), both(row.split_tokens, row.tokens), row.is_config ? t("from_config") : ""]);
  return section("packing", note(t("packing_note")), make("div", { class: "charts" }, view.figure), tableOf(heads, cells, heads.map((_, i) => i < 8), (row) => (row[8] ? "differs" : "")));
}
function samples() {
  const rows = payload.samples.map((row) => [row.type, row.place, whole(row.units), make("span", { class: "text" }, row.text)]);
  return rows.length ? section("samples", tableOf([t("type"), t("places"), unit(), t("text")], rows, [false, false, true])) : null;
}
function files() { return section("files", tableOf([t("file"), t("type"), t("bytes")], payload.files.map((row) => [row.file, row.type, whole(row.bytes)]), [false, false, true])); }
function build() {
  startPage();
  const name = payload.folder.split("/").pop();
  document.title = `${name} – evomesh`;
  document.getElementById("title").textContent = `${t("data_report")}: ${name}`;
  document.getElementById("subtitle").textContent = `${payload.folder}${payload.tokenizer ? ` · ${t("tokenizer")} ${payload.tokenizer}` : ""} · ${t("written")} ${date(payload.written)}`;
  const views = lengthViews();
  const lengths = views.length ? section("lengths", make("p", { class: "soft" }, t("drag")), make("div", { class: "charts" }, ...views.map((view) => view.figure))) : null;
  showParts([summary(), lengths, types(), duplicates("exact"), duplicates("near"), scripts(), languages(), tokenCounts(views), packing(views), samples(), files()].filter(Boolean), t("data_report"));
  drawNear(views);
}
applyTheme();
build();
document.documentElement.dataset.ready = "1";
