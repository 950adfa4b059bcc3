// The dialog of one row: its picture as large as one likes, what it was made from, all its settings.
const dialog = document.getElementById("zoom"), stage = dialog.querySelector(".stage");
const STEPS = [0, 1, 2, 4, 8];  // 0: as large as the window allows
let scale = 0, alone = false;  // alone: the page has no OUTPUT beside it

function resize(step) {
  const image = stage.querySelector("img");
  scale = STEPS[Math.min(Math.max(STEPS.indexOf(scale) + step, 0), STEPS.length - 1)];
  if (!image) return;
  stage.classList.toggle("fitted", scale === 0);
  image.style.width = scale ? scale * (image.dataset.width || image.naturalWidth) + "px" : "";
}

// The thumbnail first, then the whole picture in its place.
function large(row) {
  if (row.status === "failed") return element("p", { className: "reason" }, element("strong", {}, row.error_code), " ", row.error_message || "");
  const image = picture(row.made, "made for " + row.id);
  if (image.tagName !== "IMG" && !row.whole) return image;
  const shown = image.tagName === "IMG" ? image : element("img", { alt: "made for " + row.id });
  shown.loading = "eager";
  shown.dataset.width = row.width || "";
  if (row.whole && !alone) {
    const whole = new Image();
    whole.addEventListener("load", () => { shown.src = whole.src; });
    whole.addEventListener("error", () => { alone = !data.served; });
    whole.src = row.whole;
  }
  return shown;
}

function facts(row) {
  const size = row.width ? { size: row.width + " × " + row.height } : {};
  const seconds = row.seconds === null ? {} : { seconds: row.seconds };
  const told = { status: row.status, ...row.scores, ...size, ...seconds, ...row.settings };
  return element("dl", { className: "facts" }, ...Object.entries(told).map(([name, value]) => element("div", {},
    element("dt", {}, name.replaceAll("_", " ")), element("dd", {}, Array.isArray(value) ? value.join(", ") : String(value ?? "–")))));
}

function fill(row) {
  document.getElementById("zoom-title").textContent = row.id + (row.index ? " #" + row.index : "");
  stage.replaceChildren(large(row));
  scale = 0;
  resize(0);
  const more = row.more_contexts ? element("p", { className: "dim" }, `and ${row.more_contexts} more contexts`) : null;
  dialog.querySelector("aside").replaceChildren(...[
    row.prompt ? element("p", { className: "prompt" }, row.prompt) : null,
    row.negative_prompt ? element("p", { className: "dim" }, "without: " + row.negative_prompt) : null,
    element("div", { className: "made-of" }, ...sources(row)),
    more,
    facts(row),
    element("p", {}, element("a", { href: permalink(row) }, "Link to this row")),
  ].filter(Boolean));
  if (!dialog.open) dialog.showModal();
  stage.focus();
}

stage.addEventListener("click", () => scale ? resize(-STEPS.indexOf(scale)) : resize(2));
