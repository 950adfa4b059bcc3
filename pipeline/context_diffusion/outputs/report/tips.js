// Tooltips of terms, and buttons that copy a command. A term is shown by hover, focus or tap.
const tip = document.getElementById("tip");
const EDGE = 8;  // px between a tooltip and the window's edge

// The text of a term: a button that the keyboard reaches, or a plain span where there would be too many.
function term(text, name, tag = "button") {
  const explanation = data.glossary[name];
  if (!explanation) return element("span", {}, text);
  const attributes = tag === "button" ? { type: "button", "aria-describedby": "tip" } : {};
  return element(tag, { className: "term", "data-tip": explanation, ...attributes }, text);
}

function showTip(target) {
  tip.textContent = target.dataset.tip;
  tip.showPopover();
  const { left, top, bottom } = target.getBoundingClientRect();
  const room = document.documentElement.clientWidth - tip.offsetWidth - EDGE;
  const below = bottom + EDGE + tip.offsetHeight < innerHeight;
  tip.style.left = Math.max(EDGE, Math.min(left, room)) + "px";
  tip.style.top = (below ? bottom + EDGE : Math.max(EDGE, top - EDGE - tip.offsetHeight)) + "px";
}

function hideTip() {
  if (tip.matches(":popover-open")) tip.hidePopover();
}

function copyButton(command) {
  const button = element("button", { type: "button", "aria-label": "Copy the command" }, "Copy");
  const code = element("code", { className: "command" }, command);
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(command);
      button.textContent = "Copied";
    } catch {  // the browser does not allow it: the user copies the selected text
      getSelection().selectAllChildren(code);
      button.textContent = "Press Ctrl+C";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  return element("span", { className: "copy" }, code, button);
}

for (const [event, shows] of [["mouseover", true], ["focusin", true], ["click", true], ["mouseout", false], ["focusout", false]])
  document.addEventListener(event, ({ target }) => {
    const found = target.closest?.("[data-tip]");
    if (found && shows) showTip(found);
    else if (found || event === "click") hideTip();
  });
document.addEventListener("keydown", event => {
  if (event.key !== "Escape" || !tip.matches(":popover-open")) return;
  hideTip();
  event.preventDefault();  // the dialog stays open
});
addEventListener("scroll", hideTip, true);
