// Elements for rows, scores and failures. Whatever a manifest says is set as text.
function element(name, options = {}, ...children) {
  const { className, ...attributes } = options;
  const made = document.createElement(name);
  if (className) made.className = className;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.filter(child => child !== null));
  return made;
}

function permalink(row) {
  return "#row=" + encodeURIComponent(row.id) + "/" + (row.index ?? 0);
}

function label(name) {
  return name.replace(/_score$/, "").replaceAll("_", " ");
}

// A thumbnail, or a mat where there is none; one that the server cannot make becomes a mat as well.
function picture(place, alt) {
  const url = source.picture(place), mat = element("span", { className: "mat", role: "img", "aria-label": alt + ": not shown" }, "not shown");
  if (!url) return mat;
  const image = element("img", { src: url, alt, loading: "lazy", decoding: "async" });
  image.addEventListener("error", () => image.replaceWith(mat));
  return image;
}

function sources(row) {
  const named = [["query", row.query], ...row.context.map(context => ["context", context])];
  return named.map(([kind, one]) => element("figure", {}, picture(one.picture, kind + " of " + row.id),
    element("figcaption", {}, kind, element("span", { className: "uri" }, " " + (one.uri || "none")))));
}

function line(row) {
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
    failed ? element("span", { className: "code" }, row.error_code) : picture(row.made, "made for " + row.id));
  const contexts = row.context.slice(0, 4).map(one => picture(one.picture, "context of " + row.id));
  const many = row.context.length + row.more_contexts;
  return element("article", { className: row.status },
    element("div", { className: "pictures" },
      element("figure", {}, picture(row.query.picture, "query of " + row.id), element("figcaption", {}, "query")),
      element("figure", { className: "contexts" }, element("div", { className: "n" + contexts.length }, ...contexts),
        element("figcaption", {}, many > 1 ? many + " contexts" : many ? "context" : "no context")),
      element("figure", { className: "made" }, open, element("figcaption", {}, failed ? "failed" : "made"))),
    row.prompt ? element("p", { className: "prompt" }, row.prompt) : null,
    failed ? element("p", { className: "reason" }, row.error_message || "") : null,
    element("p", { className: "dim" }, element("strong", {}, row.id), row.index ? " #" + row.index : "", line(row) ? " · " + line(row) : ""),
    scores(row));
}

function histogram(score, choose) {
  const most = Math.max(...score.bins), width = 1 / score.bins.length;
  const bars = score.bins.map((count, bin) => {
    const [low, high] = [bin * width, (bin + 1) * width].map(edge => edge.toFixed(2));
    const said = `${label(score.name)} ${low} to ${high}: ${count.toLocaleString("en")} pictures`;
    const bar = element("button", { type: "button", "aria-label": said, title: said, "aria-pressed": "false" }, element("span"));
    bar.dataset.score = score.name;
    bar.dataset.low = low;
    bar.dataset.high = high;
    bar.firstChild.style.height = count ? Math.max(2, 100 * count / most) + "%" : "0";
    bar.disabled = !count;
    bar.addEventListener("click", () => choose(score.name, low, high));
    return bar;
  });
  return element("figure", { className: "histogram" },
    element("figcaption", {}, element("strong", {}, label(score.name)), ` mean ${score.mean.toFixed(3)}, ${score.count.toLocaleString("en")} pictures`),
    element("div", { className: "bars" }, ...bars),
    element("div", { className: "axis dim", "aria-hidden": "true" }, element("span", {}, "0"), element("span", {}, ".5"), element("span", {}, "1")));
}

function failure(code, count, reasons, choose) {
  const show = element("button", { type: "button" }, code);
  show.addEventListener("click", () => choose(code));
  return element("tr", {}, element("td", {}, show), element("td", { className: "number" }, count.toLocaleString("en")),
    element("td", {}, ...reasons.map(([id, reason]) => element("p", {}, element("strong", {}, id), " ", reason))));
}
