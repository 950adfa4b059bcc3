// Elements for rows, scores and failed rows. Values of a manifest are set as text, never as markup.
function element(name, options = {}, ...children) {
  const { className, ...attributes } = options;
  const created = document.createElement(name);
  if (className) created.className = className;
  for (const [key, value] of Object.entries(attributes)) created.setAttribute(key, value);
  created.append(...children.filter(child => child !== null));
  return created;
}

function permalink(row) {
  return "#row=" + encodeURIComponent(row.id) + "/" + (row.index ?? 0);
}

function label(name) {
  return name.replace(/_score$/, "").replaceAll("_", " ");
}

// A thumbnail, or a placeholder if there is none or it cannot be loaded. key: what source.thumbnailUrl takes.
function thumbnailImage(key, alt) {
  const url = source.thumbnailUrl(key);
  const placeholder = element("span", { className: "placeholder", role: "img", "aria-label": alt + ": not available" }, "not available");
  if (!url) return placeholder;
  const image = element("img", { src: url, alt, loading: "lazy", decoding: "async" });
  image.addEventListener("error", () => image.replaceWith(placeholder));
  return image;
}

function sources(row) {
  const labelled = [["query", row.query], ...row.context.map(context => ["context", context])];
  return labelled.map(([kind, input]) => element("figure", {}, thumbnailImage(input.thumbnail, kind + " of " + row.id),
    element("figcaption", {}, kind, element("span", { className: "uri" }, " " + (input.uri || "none")))));
}

function settingsLine(row) {
  const { scheduler, num_inference_steps: steps } = row.settings;
  const parts = [scheduler, steps && steps + (steps === 1 ? " step" : " steps"),
    "guidance_scale" in row.settings && "guidance " + row.settings.guidance_scale,
    "seed" in row.settings && "seed " + row.settings.seed];
  return parts.filter(Boolean).join(" · ");
}

function scores(row) {
  const known = Object.entries(row.scores);
  return known.length ? element("dl", { className: "scores" }, ...known.map(([name, value]) =>
    element("div", {}, element("dt", {}, label(name)), element("dd", {}, value === null ? "–" : value.toFixed(2))))) : null;
}

function card(row) {
  const failed = row.status === "failed";
  const open = element("a", { className: "open", href: permalink(row), "aria-label": (failed ? row.error_code : "Open") + " " + row.id + ", image " + (row.index ?? 0) },
    failed ? element("span", { className: "code" }, row.error_code) : thumbnailImage(row.thumbnail, "output of " + row.id));
  const contexts = row.context.slice(0, 4).map(context => thumbnailImage(context.thumbnail, "context of " + row.id));
  const contextCount = row.context.length + row.more_contexts;
  return element("article", { className: row.status },
    element("div", { className: "images" },
      element("figure", {}, thumbnailImage(row.query.thumbnail, "query of " + row.id), element("figcaption", {}, "query")),
      element("figure", { className: "contexts" }, element("div", { className: "n" + contexts.length }, ...contexts),
        element("figcaption", {}, contextCount > 1 ? contextCount + " contexts" : contextCount ? "context" : "no context")),
      element("figure", { className: "output" }, open, element("figcaption", {}, failed ? "failed" : "output"))),
    row.prompt ? element("p", { className: "prompt" }, row.prompt) : null,
    failed ? element("p", { className: "reason" }, row.error_message || "") : null,
    element("p", { className: "dim" }, element("strong", {}, row.id), row.index ? " #" + row.index : "", settingsLine(row) ? " · " + settingsLine(row) : ""),
    scores(row));
}

function histogram(score, choose) {
  const highest = Math.max(...score.bins), width = 1 / score.bins.length;
  const bars = score.bins.map((count, bin) => {
    const [low, high] = [bin * width, (bin + 1) * width].map(edge => edge.toFixed(2));
    const description = `${label(score.name)} ${low} to ${high}: ${count.toLocaleString("en")} images`;
    const bar = element("button", { type: "button", "aria-label": description, title: description, "aria-pressed": "false" }, element("span"));
    bar.dataset.score = score.name;
    bar.dataset.low = low;
    bar.dataset.high = high;
    bar.firstChild.style.height = count ? Math.max(2, 100 * count / highest) + "%" : "0";
    bar.disabled = !count;
    bar.addEventListener("click", () => choose(score.name, low, high));
    return bar;
  });
  return element("figure", { className: "histogram" },
    element("figcaption", {}, element("strong", {}, label(score.name)), ` mean ${score.mean.toFixed(3)}, ${score.count.toLocaleString("en")} images`),
    element("div", { className: "bars" }, ...bars),
    element("div", { className: "axis dim", "aria-hidden": "true" }, element("span", {}, "0"), element("span", {}, ".5"), element("span", {}, "1")));
}

function failure(code, count, reasons, choose) {
  const show = element("button", { type: "button" }, code);
  show.addEventListener("click", () => choose(code));
  return element("tr", {}, element("td", {}, show), element("td", { className: "number" }, count.toLocaleString("en")),
    element("td", {}, ...reasons.map(([id, reason]) => element("p", {}, element("strong", {}, id), " ", reason))));
}
