"""The page in headless Chromium, as a file and from the viewer: what one sees and does. No request may leave
the machine."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from context_diffusion.outputs.output_folder import Output
from support.processes import unavailable
from support.report_outputs import ATTACK, ODD_ID, data_of, finished, served

pytestmark = pytest.mark.slow
AXE = Path(__file__).parents[3] / "build" / "axe" / "package" / "axe.min.js"
SHOWN = (
    "[...document.querySelectorAll('#cards article')].map(card => card.querySelector('strong').textContent)"
)
BROKEN = (
    "[...document.images].filter(image => !(image.complete && image.naturalWidth)).map(image => image.alt)"
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        unavailable("no playwright here: pip install 'context-diffusion[full]'")
    if not (path := shutil.which("chromium")):
        unavailable("no chromium here: `make packages` installs Debian's")
    with sync_playwright() as playwright:
        # Whatever is not this machine has no address, should a page ask for it.
        rules = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", rules])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Output:
    return finished(tmp_path_factory.mktemp("report"), 70)


@pytest.fixture(scope="module")
def urls(output: Output) -> Iterator[dict[str, str]]:
    with served(output) as url:
        yield {"file": f"file://{quote(output.report)}", "served": url}


@dataclass
class Watched:
    """A page, and what must stay empty: errors, dialogs, requests to anywhere but where it came from."""

    page: Any
    url: str
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        def ask(request: Any) -> None:
            if not request.url.startswith(
                ("file:///", "data:") if self.url.startswith("file:") else (self.url, "data:")
            ):
                self.wrong.append(f"asked for {request.url[:200]}")

        self.page.on("request", ask)
        self.page.on(
            "console",
            lambda message: self.wrong.append(message.text) if message.type in ("error", "warning") else None,
        )
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: self.wrong.append(f"dialog: {dialog.message}"))

    def open(self, fragment: str = "") -> Any:
        self.page.goto(self.url + fragment)
        self.page.wait_for_selector("#count:not(:empty)")
        return self.page

    def becomes(self, expression: str, value: Any) -> None:
        """Waits: images load and a dialog's close is told in their own time."""
        self.page.wait_for_function(f"value => ({expression}) === value", arg=value)

    def close(self) -> None:
        self.page.keyboard.press("Escape")
        self.becomes("Boolean(document.querySelector('dialog[open]') || location.hash)", False)

    def told(self, text: str) -> None:
        self.page.wait_for_function(
            "text => document.getElementById('count').textContent.startsWith(text)", arg=text
        )


@pytest.fixture(params=["file", "served"])
def watched(request: pytest.FixtureRequest, chromium: Any, urls: dict[str, str]) -> Iterator[Watched]:
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    found = Watched(context.new_page(), urls[request.param])
    yield found
    context.close()
    assert found.wrong == []


def rows(output: Output, wanted: Callable[[dict[str, Any]], bool]) -> list[str]:
    """The ids of these rows, failed ones first."""
    found = [row for _, part in output.read_parts() for row in part.to_pylist() if wanted(row)]
    return [row["id"] for row in sorted(found, key=lambda row: row["status"] != "failed")]


def test_pictures_load(watched: Watched, output: Output) -> None:
    page = watched.open()
    everyone = rows(output, lambda row: True)
    watched.told(f"1–60 of {len(everyone)}")
    assert page.evaluate(SHOWN) == everyone[:60]
    page.evaluate("for (const image of document.images) image.loading = 'eager'")
    page.wait_for_function(f"() => !({BROKEN}).length")
    made = [row for row in everyone[:60] if row in rows(output, lambda row: row["status"] == "ok")]
    assert page.locator("#cards .output img").count() == len(made)
    assert page.locator("#cards .contexts img").count() >= len(made)
    page.click("#next")
    watched.told(f"61–70 of {len(everyone)}")
    assert page.evaluate(SHOWN) == everyone[60:]
    assert page.locator("#next").is_disabled()


def test_filters_filter(watched: Watched, output: Output) -> None:
    page = watched.open()
    for name, value, wanted in (
        ("text", "OCEAN", lambda row: "ocean" in (row["prompt"] or "")),
        ("status", "failed", lambda row: row["status"] == "failed"),
        ("code", "missing_file", lambda row: row["error_code"] == "missing_file"),
    ):
        field, expected = page.locator(f"[name={name}]"), rows(output, wanted)
        field.fill(value) if name == "text" else field.select_option(value)
        watched.told(f"1–{len(expected)} of {len(expected)}")
        assert page.evaluate(SHOWN) == expected
        page.click("button[type=reset]")
        watched.told("1–60 of 70")
    page.fill("[name=text]", "nothing has this")
    watched.told("None matching, 70 in total")
    page.click("#failures button:has-text('unknown_scheduler')")
    watched.told("1–1 of 1")


def test_a_bar_of_a_histogram_shows_its_pictures(watched: Watched, output: Output) -> None:
    page = watched.open()
    bars = page.locator(".bars button[data-score=style_score]:enabled")
    seen = []
    for number in range(bars.count()):
        bar = bars.nth(number)
        low, high = float(bar.get_attribute("data-low")), float(bar.get_attribute("data-high"))

        def within(row: dict[str, Any], low: float = low, high: float = high) -> bool:
            return row["style_score"] is not None and low <= row["style_score"] < high

        expected = rows(output, within)
        bar.click()
        watched.told(f"1–{len(expected)} of {len(expected)}")
        assert page.evaluate(SHOWN) == expected
        assert bar.get_attribute("aria-pressed") == "true"
        assert f": {len(expected)} images" in bar.get_attribute("aria-label")
        seen += expected
    assert sorted(seen) == sorted(rows(output, lambda row: row["status"] == "ok"))
    assert bars.count() > 1


def test_sorting_by_a_score(watched: Watched, output: Output) -> None:
    page = watched.open()
    scores = {row["id"]: row["style_score"] for _, part in output.read_parts() for row in part.to_pylist()}
    page.select_option("[name=sort]", "style_score asc")
    expected = sorted((row for row in scores if scores[row] is not None), key=lambda row: scores[row])[:60]
    page.wait_for_function(f"rows => JSON.stringify({SHOWN}) === JSON.stringify(rows)", arg=expected)


def test_keys(watched: Watched) -> None:
    page = watched.open()
    focused = (
        "document.activeElement.getAttribute('href') || document.activeElement.name || "
        "document.activeElement.className"
    )
    page.keyboard.press("/")
    assert page.evaluate(focused) == "text"
    page.keyboard.type("row-01")
    watched.told("1–10 of 10")
    page.evaluate("document.activeElement.blur()")
    for key, expected in (
        ("ArrowRight", "row-010"),
        ("ArrowRight", "row-011"),
        ("ArrowDown", "row-013"),
        ("ArrowLeft", "row-012"),
    ):
        page.keyboard.press(key)
        assert page.evaluate(focused) == f"#row={expected}/0"
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    watched.becomes("location.hash", "#row=row-012/0")
    page.keyboard.press("ArrowRight")
    watched.becomes("document.getElementById('zoom-title').textContent", "row-013")
    watched.becomes("location.hash", "#row=row-013/0")
    watched.becomes("document.querySelector('.stage img').naturalWidth", 64)
    width = "document.querySelector('.stage img').getBoundingClientRect().width"
    fitted = page.evaluate(width)
    assert fitted != 64
    for key, wide in (("+", 64), ("+", 128), ("0", fitted)):
        page.keyboard.press(key)
        watched.becomes(width, wide)
    watched.close()
    watched.becomes(focused, "#row=row-013/0")


def test_the_picture_is_shown_whole_with_all_that_made_it(watched: Watched, output: Output) -> None:
    page = watched.open("#row=row-011/0")
    page.wait_for_selector("dialog[open]")
    page.wait_for_function("() => /row-011-0.png$|full$/.test(document.querySelector('.stage img').src)")
    watched.becomes("document.querySelector('.stage img').naturalWidth", 64)
    [row] = [row for _, part in output.read_parts() for row in part.to_pylist() if row["id"] == "row-011"]
    told = page.locator("aside").inner_text()
    for text in (row["query"], *row["context"], str(row["seed"]), row["scheduler"], "ocean"):
        assert text in told
    assert page.locator("aside img").count() == 1 + len(row["context"])


def test_a_term_is_explained_by_hover_focus_and_tap(watched: Watched) -> None:
    page = watched.open()
    tip = page.locator("#tip")
    for name, words in (("occupancy", "batch"), ("style", "contexts'"), ("layout", "edges")):
        button = page.locator("button.term", has_text=name).first
        button.hover()
        assert words in tip.inner_text()
        page.mouse.move(0, 0)
        assert not tip.is_visible()
        button.focus()
        assert words in tip.inner_text()
        page.keyboard.press("Escape")
        assert not tip.is_visible()
        button.click()
        box = tip.bounding_box()
        assert 0 <= box["x"] < box["x"] + box["width"] <= 1280
    page.locator("#cards .code").first.hover()
    assert "To fix it: " in tip.inner_text()
    page.evaluate("location.hash = '#row=row-011/0'")
    page.wait_for_selector("dialog[open]")
    page.locator("aside button.term", has_text="layout score").focus()
    assert "edges" in tip.inner_text()
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    assert page.locator("dialog").is_visible()


def test_commands_can_be_copied(watched: Watched, output: Output) -> None:
    page = watched.open()
    page.evaluate("void (navigator.clipboard.writeText = async text => { window.copied = text; })")
    page.click("#retry button")
    watched.becomes("window.copied", "context-diffusion run JOB --retry-failed")
    assert page.locator("#retry button").inner_text() == "Copied"
    page.evaluate("location.hash = '#row=row-011/0'")
    page.wait_for_selector("dialog[open]")
    page.evaluate("void (navigator.clipboard.writeText = async () => { throw new Error('not allowed'); })")
    page.click("aside .copy button")
    selected = f"context-diffusion reproduce {output.root}/images/"
    page.wait_for_function("text => String(getSelection()).startsWith(text)", arg=selected)
    assert page.locator("aside .copy button").inner_text() == "Press Ctrl+C"


def test_a_card_names_its_files_and_a_bar_its_count(watched: Watched, output: Output) -> None:
    page = watched.open()
    [row] = [row for _, part in output.read_parts() for row in part.to_pylist() if row["id"] == "row-011"]
    names = page.locator("article", has_text="row-011").locator(".names").all_inner_texts()
    assert names == [row["query"], ", ".join(row["context"])]
    bars = page.locator(".bars button[data-score=style_score]:enabled")
    for bar in bars.all():
        assert f": {bar.inner_text()} images" in bar.get_attribute("aria-label")
    first = page.locator("article").first
    assert "failed" in first.get_attribute("class")
    page.click("summary")
    assert "layout" in page.locator(".settings").inner_text()


@pytest.mark.parametrize("row", [ODD_ID, ATTACK, "row-065"])
def test_a_link_leads_to_its_row(watched: Watched, row: str) -> None:
    page = watched.open(f"#row={quote(row, safe='')}/0")
    page.wait_for_selector("dialog[open]")
    assert page.locator("#zoom-title").inner_text() == row
    watched.close()
    page.evaluate("location.hash = '#row=nobody/0'")
    watched.told("The linked row is not on this page")


def test_what_a_manifest_says_stays_text(watched: Watched) -> None:
    page = watched.open()
    assert ATTACK in page.evaluate(SHOWN)
    assert page.locator("#cards .ok .prompt").first.inner_text() == "prompt leads" + ATTACK
    assert ATTACK[:40] in page.locator("#failures").inner_text()
    page.fill("[name=text]", "hacked")
    watched.told("1–3 of 3")
    for number in range(3):
        page.locator("a.open").nth(number).click()
        page.wait_for_selector("dialog[open]")
        assert ATTACK[:40] in page.locator("dialog").inner_text()
        watched.close()
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.locator("svg, script:not(#data)").count() == 1, "the page's own script alone"


def test_dark_and_light(watched: Watched) -> None:
    page = watched.open()
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.click("#theme")
    dark = page.evaluate(paper)
    page.click("#theme")
    assert page.evaluate(paper) == light
    page.emulate_media(color_scheme="dark")
    watched.open()
    page.reload()
    assert page.evaluate(paper) == dark != light


def test_on_a_phone_nothing_is_wider_than_the_screen(watched: Watched) -> None:
    watched.page.set_viewport_size({"width": 360, "height": 740})
    page = watched.open()
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) == 360
    page.locator("a.open").first.click()
    page.wait_for_selector("dialog[open]")
    assert page.evaluate(width) == 360
    assert page.evaluate("document.querySelector('.inside').scrollWidth <= 360")
    for target in page.locator("dialog button:not(.term), #filters button, .pager button").all():
        assert target.bounding_box()["height"] >= 30


def test_a_phone_shows_a_contact_sheet_as_a_grid_and_a_card_what_its_row_varies(
    chromium: Any, tmp_path: Path
) -> None:
    axes = {"context_scale": [0.5, 1.0], "num_inference_steps": [4, 8]}
    context = chromium.new_context(viewport={"width": 360, "height": 740})
    page = context.new_page()
    page.goto(f"file://{quote(finished(tmp_path, 1, {}, matrix=axes).report)}")
    page.wait_for_selector("#count:not(:empty)")
    assert page.locator(".sheet thead th").all_inner_texts() == ["num_inference_steps", "4", "8"]
    boxes = [image.bounding_box() for image in page.locator(".sheet td img").all()]
    assert boxes[0]["y"] == boxes[1]["y"] < boxes[2]["y"] == boxes[3]["y"]
    assert boxes[0]["x"] == boxes[2]["x"] < boxes[1]["x"] == boxes[3]["x"]
    assert min(box["width"] for box in boxes) >= 96
    lines = page.locator("article p:has(strong)").all_inner_texts()
    assert ["context scale 0.5" in line.replace("\u00a0", " ") for line in lines] == [
        True,
        True,
        False,
        False,
    ]
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(watched: Watched, scheme: str) -> None:
    if not AXE.exists():
        unavailable(f"no {AXE.name} here: `make packages` fetches npm's axe-core")
    watched.page.emulate_media(color_scheme=scheme)
    page = watched.open()
    page.fill("[name=text]", "row-00")  # ten cards take it as long as one likes to wait
    watched.told("1–")
    page.evaluate(AXE.read_text())

    def serious() -> list[str]:
        found = page.evaluate("axe.run()")["violations"]
        wrong = [one for one in found if one["impact"] in ("serious", "critical")]
        return [f"{one['id']}: {node['html'][:150]}" for one in wrong for node in one["nodes"]]

    assert serious() == []
    page.locator("a.open").first.click()
    page.wait_for_selector("dialog[open]")
    assert serious() == []
    page.evaluate("document.querySelector('aside img').removeAttribute('alt')")
    assert [line.split(":")[0] for line in serious()] == ["image-alt"], "it would find what is wrong"


def test_the_page_alone_is_whole(chromium: Any, output: Output, tmp_path: Path) -> None:
    (tmp_path / "alone.html").write_bytes(Path(output.report).read_bytes())
    found = Watched(chromium.new_page(), f"file://{tmp_path}/alone.html")
    page = found.open()
    page.evaluate("for (const image of document.images) image.loading = 'eager'")
    page.wait_for_function(f"() => !({BROKEN}).length")
    assert page.locator("#cards .output img").count() > 50
    assert found.wrong == []
    page.locator(".ok a.open").first.click()
    page.wait_for_selector("dialog[open]")
    found.becomes("document.querySelector('.stage img').naturalWidth", 64)
    page.close()


def test_the_policy_keeps_any_script_and_request_out(chromium: Any, output: Output) -> None:
    """What would happen, should a text become markup after all: nothing."""
    calls, listening = list[bytes](), socket.create_server(("127.0.0.1", 0))

    def listen() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            calls.append(connection.recv(100))
            connection.close()

    threading.Thread(target=listen, daemon=True).start()
    elsewhere = f"http://127.0.0.1:{listening.getsockname()[1]}/"
    page = chromium.new_page()
    page.goto(f"file://{quote(output.report)}")
    refused = page.evaluate(
        """async url => {
          document.body.insertAdjacentHTML("beforeend", `<img src="${url}1"><iframe src="${url}2"></iframe>
            <img src=x onerror="window.hacked = 1"><form action="${url}3"><button id=send></button></form>`);
          const script = document.createElement("script");
          script.textContent = "window.hacked = 2";
          document.body.append(script);
          document.getElementById("send").click();
          const socket = () => new Promise(
            (_, no) => { new WebSocket(url.replace("http", "ws")).onerror = no; }
          );
          let refused = 0;
          for (const ask of [() => fetch(url + 4), socket]) await ask().catch(() => { refused += 1; });
          await new Promise(done => setTimeout(done, 300));
          return refused;
        }""",
        elsewhere,
    )
    assert refused == 2
    assert page.evaluate("window.hacked") is None
    assert calls == []
    page.close()
    listening.close()


def test_the_sample_says_what_it_lacks(chromium: Any, output: Output, tmp_path: Path) -> None:
    from context_diffusion.outputs.report.build import rebuild
    from support.report_outputs import parts

    many = parts(
        tmp_path / "out",
        [{"id": f"row-{number}", "layout_score": number / 1000} for number in range(1000)],
        100,
    )
    rebuild(many)
    found = Watched(chromium.new_page(), f"file://{many.report}")
    page = found.open()
    here = len(data_of(Path(many.report).read_text())["rows"])
    assert 120 <= here < 150
    assert (
        f"1–60 of {here} on this page; OUTPUT has 1,000: run context-diffusion view OUTPUT"
        in page.locator("#count").inner_text()
    )
    assert "50 images" in page.locator(".bars button").first.get_attribute("aria-label")
    assert found.wrong == []
    page.close()
