// The dialog of one row: its image at any zoom, its inputs and all its settings.
const dialog = document.getElementById("zoom"), stage = dialog.querySelector(".stage");
const STEPS = [0, 1, 2, 4, 8];  // 0: as large as the window allows
const retryCommand = document.getElementById("retry").dataset.command;
let scale = 0;
let standalone = false;  // the page was copied without its OUTPUT, so no full images can be loaded

function resize(step) {
  const image = stage.querySelector("img");
  scale = STEPS[Math.min(Math.max(STEPS.indexOf(scale) + step, 0), STEPS.length - 1)];
  if (!image) return;
  stage.classList.toggle("fitted", scale === 0);
  image.style.width = scale ? scale * (image.dataset.width || image.naturalWidth) + "px" : "";
}

// Shows the thumbnail first, and replaces it by the full image once that is loaded.
function stageContent(row) {
  if (row.status === "failed") return element("p", { className: "reason" }, element("strong", {}, row.error_code), " ", row.error_message || "");
  const alt = "output of " + row.id;
  const thumbnail = thumbnailImage(row.thumbnail, alt);
  if (thumbnail.tagName !== "IMG" && !row.full_image) return thumbnail;
  const image = thumbnail.tagName === "IMG" ? thumbnail : element("img", { alt });
  image.loading = "eager";
  image.dataset.width = row.width || "";
  if (row.full_image && !standalone) {
    const fullImage = new Image();
    fullImage.addEventListener("load", () => { image.src = fullImage.src; });
    fullImage.addEventListener("error", () => { standalone = !data.served; });
    fullImage.src = row.full_image;
  }
  return image;
}

function details(row) {
  const size = row.width ? { size: row.width + " × " + row.height } : {};
  const seconds = row.seconds === null ? {} : { seconds: row.seconds };
  const code = row.error_code ? { "error code": row.error_code } : {};
  const fields = { status: row.status, ...code, ...Object.fromEntries(scoreEntries(row)), ...size, ...seconds, ...row.settings };
  return element("dl", { className: "details" }, ...Object.entries(fields).map(([name, value]) => element("div", {},
    element("dt", {}, term(name.replaceAll("_", " "), name)),
    element("dd", {}, name === "error code" ? term(value, value) : Array.isArray(value) ? value.map(rounded).join(", ") : String(rounded(value) ?? "–")))));
}

function openDialog(row) {
  document.getElementById("zoom-title").textContent = row.id + (row.index ? " #" + row.index : "");
  stage.replaceChildren(stageContent(row));
  scale = 0;
  resize(0);
  const moreContexts = row.more_contexts ? element("p", { className: "dim" }, `and ${row.more_contexts} more contexts`) : null;
  dialog.querySelector("aside").replaceChildren(...[
    promptText(row, "button"),
    unknownWords(row),
    row.negative_prompt ? element("p", { className: "dim" }, "negative prompt: " + row.negative_prompt) : null,
    row.full_prompt ? element("p", { className: "dim" }, "what the model read: " + row.full_prompt) : null,
    element("div", { className: "row-sources" }, ...sources(row)),
    moreContexts,
    details(row),
    row.reproduce ? element("p", {}, "Generate it again and compare:", copyButton(row.reproduce)) : null,
    row.status === "failed" ? element("p", {}, "After fixing the cause:", copyButton(retryCommand)) : null,
    element("p", {}, element("a", { href: permalink(row) }, "Link to this row")),
  ].filter(Boolean));
  if (!dialog.open) dialog.showModal();
  stage.focus();
}

stage.addEventListener("click", () => scale ? resize(-STEPS.indexOf(scale)) : resize(2));
