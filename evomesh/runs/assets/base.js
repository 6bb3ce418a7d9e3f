"use strict";
// What every page has: languages, theme, tables, sections.
let payload = JSON.parse(document.getElementById("payload").textContent);
const stored = (key, value) => { try { if (value !== undefined) localStorage.setItem(key, value); return localStorage.getItem(key); } catch { return null; } };
let language = stored("evomesh-language") || ((navigator.language || "").startsWith("zh") ? "zh" : "en");
let theme = stored("evomesh-theme") || "auto";
function t(key) { const word = WORDS[key]; return word ? word[language === "zh" ? 1 : 0] : key; }
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}
function tableOf(heads, rows, numbers = [], marks = () => "") {
  const cell = (tag, value, i, extra = {}) => make(tag, { ...extra, class: numbers[i] ? "number" : "wrap" }, value instanceof Node ? value : String(value ?? "–"));
  const body = rows.map((row) => make("tr", marks(row) ? { class: marks(row) } : {}, ...row.slice(0, heads.length).map((value, i) => cell("td", value, i))));
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads.map((head, i) => cell("th", head, i, { scope: "col" })))), make("tbody", {}, ...body));
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": heads.join(", ") }, table);
}
const date = (seconds) => (typeof seconds === "number" ? new Date(seconds * 1000).toLocaleString(language === "zh" ? "zh-CN" : "en-GB", { dateStyle: "medium", timeStyle: "medium" }) : "–");
const fixed = (value, digits = 1) => (typeof value === "number" ? value.toLocaleString("en-US", { maximumFractionDigits: digits, minimumFractionDigits: digits }) : "–");
const whole = (value) => (typeof value === "number" ? value.toLocaleString("en-US") : "–");
function duration(seconds) {
  if (typeof seconds !== "number") return "–";
  if (seconds < 100) return `${fixed(seconds)} s`;
  const all = Math.round(seconds), h = Math.floor(all / 3600), m = Math.floor((all % 3600) / 60);
  return h ? `${h} h ${m} min` : `${m} min ${all % 60} s`;
}
const percent = (value) => (typeof value === "number" ? `${fixed(100 * value)} %` : "–");

// 32-bit numbers that were written as base64.
function numbersOf(text) {
  const bytes = atob(text), buffer = new Uint8Array(bytes.length);
  for (let i = 0; i < bytes.length; i++) buffer[i] = bytes.charCodeAt(i);
  return new Float32Array(buffer.buffer);
}

function section(id, ...children) { return make("section", { id, "aria-labelledby": `${id}-h` }, make("h2", { id: `${id}-h` }, t(id)), ...children); }
// Draw charts as they come near the window, one in a frame, so that the first is there soon.
function drawNear(views) {
  const waiting = [];
  const drawNext = () => { const view = waiting[0]; if (drawn.includes(view)) view.draw(); waiting.shift(); if (waiting.length) requestAnimationFrame(drawNext); };
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((one) => one.isIntersecting)) {
      watcher.unobserve(entry.target);
      if (waiting.push(entry.target.view) === 1) drawNext();
    }
  }, { rootMargin: "400px" });
  for (const view of views) { view.box.view = view; watcher.observe(view.box); }
  // The others get their sentences while the reader looks at the first.
  const idle = window.requestIdleCallback || ((task) => setTimeout(task, 50));
  const fillNext = () => { const view = drawn.find((one) => !one.isFilled); if (view) { view.fill(); idle(fillNext); } };
  requestAnimationFrame(() => idle(fillNext));
}
function applyTheme() { if (theme === "auto") document.documentElement.removeAttribute("data-theme"); else document.documentElement.dataset.theme = theme; }
function redraw() { for (const view of drawn) if (view.plot) view.draw(); }

document.getElementById("language").onclick = () => { language = language === "zh" ? "en" : "zh"; stored("evomesh-language", language); build(); };
document.getElementById("theme").onclick = () => {
  theme = { auto: "light", light: "dark", dark: "auto" }[theme] || "auto";
  stored("evomesh-theme", theme); applyTheme(); redraw();
  document.getElementById("theme").textContent = `${t("theme")}: ${t(theme)}`;
};
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
addEventListener("beforeprint", () => { document.documentElement.dataset.theme = "light"; for (const view of drawn) { view.draw(); view.plot.setSize(view.printSize); } });
addEventListener("afterprint", () => { applyTheme(); redraw(); });
function startPage() {
  for (const view of drawn.splice(0)) view.close();
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
  document.getElementById("language").textContent = language === "zh" ? "English" : "中文";
  document.getElementById("theme").textContent = `${t("theme")}: ${t(theme)}`;
}
function showParts(parts, label) {
  document.getElementById("main").replaceChildren(...parts);
  document.getElementById("contents").setAttribute("aria-label", label);
  document.getElementById("contents").replaceChildren(...parts.map((part) => make("a", { href: `#${part.id}` }, t(part.id))));
}
