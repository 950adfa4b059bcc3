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

// The name of a file without its folders.
function fileName(uri) {
  return uri ? uri.split("/").pop() : "";
}

// A number with three digits, or fewer.
function rounded(value) {
  return typeof value === "number" && !Number.isInteger(value) ? +value.toPrecision(3) : value;
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

// The settings that users change most, those of contexts only where they have an effect of their own.
function settingsLine(row) {
  const { scheduler, num_inference_steps: steps, guidance_scale: guidance, context_guidance_scale: contextGuidance,
    context_scale: contextScale, context_weights: weights, strength, seed } = row.settings;
  const parts = [scheduler, steps && steps + (steps === 1 ? " step" : " steps"),
    guidance !== undefined && "guidance " + guidance,
    contextGuidance !== undefined && contextGuidance !== guidance && "context guidance " + contextGuidance,
    contextScale !== undefined && contextScale !== 1 && "context scale " + contextScale,
    weights && "weights " + weights.join(", "),
    strength !== undefined && "strength " + strength,
    seed !== undefined && "seed " + seed];
  return parts.filter(Boolean).map(part => part.replaceAll(" ", "\u00a0")).join(" · ");
}

// The prompt score is beside the style score, since a prompt may explain a low one.
function scoreEntries(row) {
  const order = ["layout_score", "style_score", "prompt_score"];
  const rank = name => order.includes(name) ? order.indexOf(name) : order.length;
  return Object.entries(row.scores).sort(([first], [second]) => rank(first) - rank(second));
}

function scores(row) {
  const known = scoreEntries(row);
  return known.length ? element("dl", { className: "scores" }, ...known.map(([name, value]) =>
    element("div", {}, element("dt", {}, term(label(name), name, "span")), element("dd", {}, value === null ? "–" : value.toFixed(2))))) : null;
}

// tag: of the mark on a row whose prompt goes before its contexts.
function promptText(row, tag) {
  if (!row.prompt) return null;
  const mark = row.prompt_leads ? element("span", { className: "mark" }, term("prompt leads", "prompt leads", tag)) : null;
  return element("p", { className: "prompt" }, mark, row.prompt);
}

function unknownWords(row) {
  if (!row.unknown_words.length) return null;
  return element("p", { className: "dim" }, term("words without effect", "words without effect", "span"), ": " + row.unknown_words.join(", "));
}

function captions(row) {
  const count = row.context.length + row.more_contexts;
  const names = row.context.map(context => fileName(context.uri)).filter(Boolean);
  return [[row.query.uri ? "query" : "no query", [fileName(row.query.uri)]], [count > 1 ? count + " contexts" : count ? "context" : "no context", names]]
    .map(([kind, files]) => element("figcaption", { title: files.join(", ") }, kind, element("span", { className: "names" }, files.join(", "))));
}

function card(row) {
  const failed = row.status === "failed";
  const code = failed ? element("span", { className: "code", "data-tip": data.glossary[row.error_code] || row.error_code }, row.error_code) : null;
  const open = element("a", { className: "open", href: permalink(row), "aria-label": (failed ? row.error_code : "Open") + " " + row.id + ", image " + (row.index ?? 0) },
    code || thumbnailImage(row.thumbnail, "output of " + row.id));
  const contexts = row.context.slice(0, 4).map(context => thumbnailImage(context.thumbnail, "context of " + row.id));
  const [queryCaption, contextCaption] = captions(row);
  return element("article", { className: row.status },
    element("div", { className: "images" },
      element("figure", {}, thumbnailImage(row.query.thumbnail, "query of " + row.id), queryCaption),
      element("figure", { className: "contexts" }, element("div", { className: "n" + contexts.length }, ...contexts), contextCaption),
      element("figure", { className: "output" }, open, element("figcaption", {}, failed ? "failed" : "output"))),
    promptText(row, "span"),
    unknownWords(row),
    failed ? element("p", { className: "reason" }, row.error_message || "") : null,
    element("p", { className: "dim" }, element("strong", {}, row.id), row.index ? " #" + row.index : "", settingsLine(row) ? " · " + settingsLine(row) : ""),
    scores(row));
}

const BAR_HEIGHT = 88;  // px of the highest bar; its count is above it

function compact(count) {
  return count.toLocaleString("en", { notation: "compact", maximumFractionDigits: 0 });
}

function histogram(score, choose) {
  const highest = Math.max(...score.bins), width = 1 / score.bins.length;
  const bars = score.bins.map((count, bin) => {
    const [low, high] = [bin * width, (bin + 1) * width].map(edge => edge.toFixed(2));
    const description = `${label(score.name)} ${low} to ${high}: ${count.toLocaleString("en")} images`;
    const bar = element("button", { type: "button", "aria-label": description, title: description, "aria-pressed": "false" },
      element("small", { "aria-hidden": "true" }, count ? compact(count) : ""), element("span"));
    bar.dataset.score = score.name;
    bar.dataset.low = low;
    bar.dataset.high = high;
    bar.lastChild.style.height = count ? Math.max(2, BAR_HEIGHT * count / highest) + "px" : "0";
    bar.disabled = !count;
    bar.addEventListener("click", () => choose(score.name, low, high));
    return bar;
  });
  return element("figure", { className: "histogram" },
    element("figcaption", {}, element("strong", {}, term(label(score.name), score.name)), ` mean ${score.mean.toFixed(2)}, ${score.count.toLocaleString("en")} images`),
    element("div", { className: "bars" }, ...bars),
    element("div", { className: "axis dim", "aria-hidden": "true" }, element("span", {}, "0"), element("span", {}, "0.5"), element("span", {}, "1")));
}

function failure(code, count, reasons, choose) {
  const show = element("button", { type: "button" }, code);
  show.addEventListener("click", () => choose(code));
  if (data.glossary[code]) show.dataset.tip = data.glossary[code];
  return element("tr", {}, element("td", {}, show), element("td", { className: "number" }, count.toLocaleString("en")),
    element("td", {}, ...reasons.map(([id, reason]) => element("p", {}, element("strong", {}, id), " ", reason))));
}
