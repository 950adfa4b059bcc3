// Navigation of the page: filters, pages, keys, links to rows.
const form = document.getElementById("filters"), cards = document.getElementById("cards"), count = document.getElementById("count");
const number = value => value.toLocaleString("en");
let offset = 0;
let page = { total: 0, rows: [] };
let requests = 0;  // sent so far: only the answer to the last one is shown
let typing = 0;  // the timer that waits for the end of typing

function currentQuery() {
  const value = name => form.elements[name].value;
  const [sort, order] = value("sort").split(" ");
  const bound = (name, fallback) => value(name) === "" || Number.isNaN(+value(name)) ? fallback : +value(name);
  return { text: value("text").trim(), status: value("status"), code: value("code"), score: value("score"),
    low: bound("low", 0), high: bound("high", 1), sort: sort || "", order: order || "asc", offset, limit: PAGE };
}

function countText() {
  const onPage = data.served ? data.entries : data.rows.length;
  const range = page.total ? `${number(offset + 1)}–${number(offset + page.rows.length)} of ${number(page.total)}` : "None";
  const matching = page.total < onPage ? ` matching, ${number(onPage)} in total` : "";
  const sample = onPage < data.entries ? ` on this page; OUTPUT has ${number(data.entries)}: run context-diffusion view OUTPUT to see all` : "";
  return range + matching + sample;
}

async function show(from = 0) {
  const requestNumber = ++requests;
  offset = from;
  let answer;
  try {
    answer = await source.find(currentQuery());
  } catch (error) {
    if (requestNumber === requests) count.textContent = "Loading the rows failed: " + error.message;
    return;
  }
  if (requestNumber !== requests) return;
  page = answer;
  cards.replaceChildren(...page.rows.map(card));
  count.textContent = countText();
  document.getElementById("previous").disabled = offset === 0;
  document.getElementById("next").disabled = offset + PAGE >= page.total;
  const { score, low, high } = currentQuery();
  for (const bar of document.querySelectorAll(".bars button"))
    bar.setAttribute("aria-pressed", String(bar.dataset.score === score && +bar.dataset.low >= low && +bar.dataset.high <= high));
}

function filterBy(values) {
  form.reset();
  for (const [name, value] of Object.entries(values)) form.elements[name].value = value;
  document.getElementById("gallery-title").scrollIntoView();
  return show();
}

async function openLinked() {
  const match = /^#row=([^/]*)\/(\d+)$/.exec(location.hash);
  if (!match) return dialog.open && dialog.close();
  let row = null;
  let reason = "";
  try {
    const id = decodeURIComponent(match[1]);
    const index = +match[2];
    row = page.rows.find(candidate => candidate.id === id && (candidate.index ?? 0) === index) || await source.row(id, index);
  } catch (error) {
    reason = ": " + error.message;
  }
  if (row) openDialog(row);
  else count.textContent = "The linked row is not on this page" + (data.served ? reason : "; run context-diffusion view OUTPUT to see all rows");
}

async function step(by) {
  const current = page.rows.findIndex(row => permalink(row) === location.hash);
  let next = current + by;
  if (current < 0) return;
  if (next < 0 || next >= page.rows.length) {
    const from = offset + (by < 0 ? -PAGE : PAGE);
    if (from < 0 || from >= page.total) return;
    await show(from);
    next = by < 0 ? page.rows.length - 1 : 0;
  }
  location.replace(permalink(page.rows[next]));
}

function move(by) {
  const links = [...cards.querySelectorAll("a.open")];
  const current = links.indexOf(document.activeElement);
  const next = links[current < 0 ? 0 : Math.min(Math.max(current + by, 0), links.length - 1)];
  if (next) next.focus();
}

function columns() {
  return getComputedStyle(cards).gridTemplateColumns.split(" ").length;
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const keys = dialog.open
    ? { ArrowLeft: () => step(-1), ArrowRight: () => step(1), "+": () => resize(1), "=": () => resize(1), "-": () => resize(-1), 0: () => resize(-STEPS.length) }
    : { "/": () => form.elements.text.focus(), ArrowLeft: () => move(-1), ArrowRight: () => move(1), ArrowUp: () => move(-columns()), ArrowDown: () => move(columns()) };
  const panning = dialog.open && scale && event.key.startsWith("Arrow");
  if (event.target.closest("input, select") || panning || !(event.key in keys)) return;
  event.preventDefault();
  keys[event.key]();
}

function setTheme(dark) {
  document.documentElement.style.colorScheme = dark ? "dark" : "light";
  document.getElementById("theme").textContent = dark ? "Light" : "Dark";
}

function fillControls() {
  const codes = Object.entries(data.codes).sort((first, second) => second[1] - first[1]);
  const add = (name, value, text) => form.elements[name].append(element("option", { value }, text));
  for (const [code] of codes) add("code", code, code);
  add("sort", "", codes.length ? "failed rows first" : "OUTPUT order");
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
    histogram(score, (name, low, high) => filterBy({ score: name, low, high }))));
  document.getElementById("failures").hidden = !codes.length;
  document.getElementById("retry").append(copyButton(retryCommand));
  document.querySelector("#failures tbody").append(...codes.map(([code, rows]) =>
    failure(code, rows, reasons(code), selected => filterBy({ code: selected }))));
}

function reasons(code) {
  return data.served ? data.reasons[code] || []
    : data.rows.filter(row => row.error_code === code).slice(0, 3).map(row => [row.id, row.error_message || ""]);
}

form.addEventListener("submit", event => event.preventDefault());
form.addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(show, data.served ? 200 : 60); });
form.addEventListener("reset", () => setTimeout(show));
dialog.addEventListener("close", () => {
  const link = [...cards.querySelectorAll("a.open")].find(anchor => anchor.getAttribute("href") === location.hash);
  history.replaceState(null, "", location.pathname + location.search);
  if (link) link.focus();
});
for (const [id, action] of Object.entries({
  previous: () => show(offset - PAGE), next: () => show(offset + PAGE), back: () => step(-1), forward: () => step(1),
  smaller: () => resize(-1), larger: () => resize(1), close: () => dialog.close(),
  theme: () => setTheme(document.getElementById("theme").textContent === "Dark"),
})) document.getElementById(id).addEventListener("click", action);
addEventListener("keydown", onKey);
addEventListener("hashchange", openLinked);
if (matchMedia("(prefers-color-scheme: dark)").matches) document.getElementById("theme").textContent = "Light";
fillControls();
show().then(openLinked);
