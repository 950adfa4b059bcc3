// What the page shows and how it is moved through: filters, pages, keys, links to rows.
const form = document.getElementById("filters"), cards = document.getElementById("cards"), count = document.getElementById("count");
const number = value => value.toLocaleString("en");
let offset = 0, found = { total: 0, rows: [] }, asked = 0, typing = 0;

function question() {
  const value = name => form.elements[name].value;
  const [sort, order] = value("sort").split(" ");
  const edge = (name, otherwise) => value(name) === "" || Number.isNaN(+value(name)) ? otherwise : +value(name);
  return { text: value("text").trim(), status: value("status"), code: value("code"), score: value("score"),
    low: edge("low", 0), high: edge("high", 1), sort: sort || "", order: order || "asc", offset, limit: PAGE };
}

function told() {
  const here = data.served ? data.of : data.rows.length;
  const range = found.total ? `${number(offset + 1)}–${number(offset + found.rows.length)} of ${number(found.total)}` : "None";
  const match = found.total < here ? ` that match, of ${number(here)}` : "";
  const sample = here < data.of ? ` on this page; OUTPUT has ${number(data.of)}, context-diffusion view OUTPUT shows them all` : "";
  return range + match + sample;
}

async function show(from = 0) {
  const mine = ++asked;
  offset = from;
  let answer;
  try {
    answer = await source.find(question());
  } catch (error) {
    if (mine === asked) count.textContent = "The rows cannot be had: " + error.message;
    return;
  }
  if (mine !== asked) return;  // a later question was asked meanwhile
  found = answer;
  cards.replaceChildren(...found.rows.map(card));
  count.textContent = told();
  document.getElementById("previous").disabled = offset === 0;
  document.getElementById("next").disabled = offset + PAGE >= found.total;
  const { score, low, high } = question();
  for (const bar of document.querySelectorAll(".bars button"))
    bar.setAttribute("aria-pressed", String(bar.dataset.score === score && +bar.dataset.low >= low && +bar.dataset.high <= high));
}

function choose(values) {
  form.reset();
  for (const [name, value] of Object.entries(values)) form.elements[name].value = value;
  document.getElementById("gallery-title").scrollIntoView();
  return show();
}

async function openLinked() {
  const match = /^#row=([^/]*)\/(\d+)$/.exec(location.hash);
  if (!match) return dialog.open && dialog.close();
  let row = null, why = "";
  try {
    const [id, index] = [decodeURIComponent(match[1]), +match[2]];
    row = found.rows.find(one => one.id === id && (one.index ?? 0) === index) || await source.row(id, index);
  } catch (error) {
    why = ": " + error.message;
  }
  if (row) fill(row);
  else count.textContent = "The row of this link is not on this page" + (data.served ? why : "; context-diffusion view OUTPUT has all");
}

async function step(by) {
  const here = found.rows.findIndex(row => permalink(row) === location.hash);
  let at = here + by;
  if (here < 0) return;
  if (at < 0 || at >= found.rows.length) {
    const from = offset + (by < 0 ? -PAGE : PAGE);
    if (from < 0 || from >= found.total) return;
    await show(from);
    at = by < 0 ? found.rows.length - 1 : 0;
  }
  location.replace(permalink(found.rows[at]));
}

function move(by) {
  const links = [...cards.querySelectorAll("a.open")], here = links.indexOf(document.activeElement);
  const next = links[here < 0 ? 0 : Math.min(Math.max(here + by, 0), links.length - 1)];
  if (next) next.focus();
}

function columns() {
  return getComputedStyle(cards).gridTemplateColumns.split(" ").length;
}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const keys = dialog.open
    ? { ArrowLeft: () => step(-1), ArrowRight: () => step(1), "+": () => resize(1), "=": () => resize(1), "-": () => resize(-1), 0: () => resize(-STEPS.length) }
    : { "/": () => form.elements.text.focus(), ArrowLeft: () => move(-1), ArrowRight: () => move(1), ArrowUp: () => move(-columns()), ArrowDown: () => move(columns()) };
  const panning = dialog.open && scale && event.key.startsWith("Arrow");
  if (event.target.closest("input, select") || panning || !(event.key in keys)) return;
  event.preventDefault();
  keys[event.key]();
}

function theme(dark) {
  document.documentElement.style.colorScheme = dark ? "dark" : "light";
  document.getElementById("theme").textContent = dark ? "Light" : "Dark";
}

function fillIn() {
  const add = (name, value, text) => form.elements[name].append(element("option", { value }, text));
  for (const code of Object.keys(data.codes)) add("code", code, code);
  add("sort", "", "as in the output");
  for (const { name } of data.histograms) {
    add("score", name, label(name));
    add("sort", name + " asc", label(name) + ", worst first");
    add("sort", name + " desc", label(name) + ", best first");
  }
  add("sort", "seconds desc", "slowest first");
  add("sort", "id asc", "id");
  for (const part of form.querySelectorAll(".scored")) part.hidden = !data.histograms.length;
  document.getElementById("scores").hidden = !data.histograms.length;
  document.querySelector(".histograms").append(...data.histograms.map(score =>
    histogram(score, (name, low, high) => choose({ score: name, low, high }))));
  const codes = Object.entries(data.codes).sort((one, other) => other[1] - one[1]);
  document.getElementById("failures").hidden = !codes.length;
  document.querySelector("#failures tbody").append(...codes.map(([code, many]) =>
    failure(code, many, reasons(code), chosen => choose({ code: chosen }))));
}

function reasons(code) {
  return data.served ? data.reasons[code] || []
    : data.rows.filter(row => row.error_code === code).slice(0, 3).map(row => [row.id, row.error_message || ""]);
}

form.addEventListener("submit", event => event.preventDefault());
form.addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(show, data.served ? 200 : 60); });
form.addEventListener("reset", () => setTimeout(show));
dialog.addEventListener("close", () => {
  const link = [...cards.querySelectorAll("a.open")].find(one => one.getAttribute("href") === location.hash);
  history.replaceState(null, "", location.pathname + location.search);
  if (link) link.focus();
});
for (const [id, action] of Object.entries({
  previous: () => show(offset - PAGE), next: () => show(offset + PAGE), back: () => step(-1), forward: () => step(1),
  smaller: () => resize(-1), larger: () => resize(1), close: () => dialog.close(),
  theme: () => theme(document.getElementById("theme").textContent === "Dark"),
})) document.getElementById(id).addEventListener("click", action);
addEventListener("keydown", pressed);
addEventListener("hashchange", openLinked);
if (matchMedia("(prefers-color-scheme: dark)").matches) document.getElementById("theme").textContent = "Light";
fillIn();
show().then(openLinked);
