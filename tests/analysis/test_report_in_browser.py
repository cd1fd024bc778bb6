"""The page in a real browser, as a reader has it: by mouse, by keyboard, on a phone, in the dark, on paper."""

import os
import shutil

import pytest
import torch

from mope_fast.analysis import Recorder

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if BROWSER is None and os.environ.get("MOPE_FAST_BROWSER") != "required":
    pytest.skip("needs Chromium: chromium, chromium-browser or google-chrome on the path", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright, of the dev extra")

LAYERS, EXPERTS, CLASSES, STEPS = 4, 5, 3, 6
NASTY = "</script><script>document.title='injected'</script><img src=x onerror=\"document.title='injected'\">"
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


def wait_until(page, holds):
    """Ask again and again; Playwright's own wait_for_function does so by an eval, which the page's policy forbids."""
    for _ in range(250):
        if holds():
            return
        page.wait_for_timeout(20)
    raise AssertionError("it did not come to hold within 5 seconds")


CONTRASTS = """() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = numbers(color).map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if ((numbers(color)[3] ?? 1) === 1) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest("script, title, .unseen")) continue;
    const style = getComputedStyle(element);
    const [a, b] = [light(element.closest("svg") ? style.fill : style.color), light(behind(element))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), walker.currentNode.data]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def recorder():
    torch.manual_seed(0)
    recorder = Recorder(class_names=["red", "a class of a rather long name, for a column of labels", "<b>blue</b>"], top=4)
    tendency = torch.randn(LAYERS, CLASSES, EXPERTS) * 2
    for _ in range(STEPS):
        labels = torch.randint(CLASSES, (16,))
        recorder.update((tendency[:, labels] + torch.randn(LAYERS, 16, EXPERTS)).softmax(-1), labels)
    return recorder


@pytest.fixture(scope="module")
def file(recorder, tmp_path_factory):
    picture = torch.rand(3, 20, 30)
    path = tmp_path_factory.mktemp("page") / "report.html"
    return recorder.report(path, samples=lambda i: (f"{NASTY} {i} " + "unbroken" * 20, picture))


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens a file; at the end nothing may have been loaded, complained or run that is not the page's own."""
    problems, contexts = [], []

    def open_page(file, width=1400, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        own = file.as_uri()
        page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("data:", own)) or problems.append(request.url))
        page.goto(own)
        return page

    yield open_page
    titles = {page.title() for context in contexts for page in context.pages}
    for context in contexts:
        context.close()
    assert problems == []
    assert "injected" not in titles


def cell(page, host, columns, rows, column, row, tall=34):
    """Where a heat map's cell is in the window."""
    svg = page.locator(f"{host} .cells svg")
    svg.scroll_into_view_if_needed()
    area = svg.bounding_box()
    return area["x"] + (column + 0.5) * area["width"] / columns, area["y"] + (row + 0.5) * (area["height"] - tall) / rows


def test_tooltips_say_the_exact_values(open_page, file, recorder):
    page = open_page(file)
    tip = page.locator("#tip")
    assert not tip.is_visible()
    for layer, expert in ((0, 0), (2, 4), (3, 1)):
        page.mouse.move(*cell(page, "#importance", EXPERTS, LAYERS, expert, layer))
        value = float(recorder.importance[layer, expert])
        lines = [
            f"layer {layer}, expert {expert}",
            f"mean score {value:.4f}",
            f"{value * EXPERTS:.2f} \N{MULTIPLICATION SIGN} the fair share",
        ]
        assert tip.inner_text().split("\n") == lines
    page.mouse.move(*cell(page, "#curves", STEPS, EXPERTS, 4, 2))
    assert f"expert 2, step 4\nmean score {float(recorder.curves.importance[4, 0, 2]):.4f}\n" in tip.inner_text()
    page.mouse.move(*cell(page, "#classes", EXPERTS, CLASSES, 3, 2))
    text = tip.inner_text()
    assert text.startswith(f"<b>blue</b>, expert 3\nmean score {float(recorder.by_class[0, 2, 3]):.4f}\n")
    assert text.endswith(f"\n{int(recorder.class_counts[2])} samples")
    entropy = page.locator("#entropy > svg")
    entropy.scroll_into_view_if_needed()
    area = entropy.bounding_box()
    page.mouse.move(area["x"] + 30 + (area["width"] - 36) * 1.5 / LAYERS, area["y"] + 100)
    assert tip.inner_text().startswith(
        f"layer 1\nbalance {float(recorder.balance[1]):.4f}\nentropy {float(recorder.entropy[1]):.4f}\n"
    )
    page.mouse.move(5, 5)
    assert not tip.is_visible()


def test_a_layer_is_chosen_by_mouse_and_by_keyboard(open_page, file, recorder):
    def shown():
        first = page.locator(".expert").first
        texts = page.locator("h2 .layer").all_inner_texts()
        return {int(text) for text in texts}, int(first.locator("h3").inner_text().split()[1])

    def expected(layer):
        return {layer}, int(recorder.importance[layer].argmax())

    page = open_page(file)
    assert shown() == expected(0)
    page.locator("#choices label").nth(2).click()
    assert shown() == expected(2)
    page.keyboard.press("ArrowRight")
    assert shown() == expected(3)
    assert page.evaluate("document.activeElement.value") == "3"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert shown() == expected(1)
    # a row of the importance map is a layer too
    page.mouse.click(*cell(page, "#importance", EXPERTS, LAYERS, 1, 3))
    assert shown() == expected(3)
    assert page.locator("#choices input").nth(3).is_checked()


def test_values_are_read_by_keyboard(open_page, file, recorder):
    page = open_page(file)
    page.locator("#importance .cells").focus()
    said = page.locator("#said")
    page.keyboard.press("ArrowRight")
    assert said.inner_text().startswith("layer 0, expert 0")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowUp", "ArrowUp", "ArrowDown"):
        page.keyboard.press(key)
    assert f"layer 1, expert 2\nmean score {float(recorder.importance[1, 2]):.4f}" in page.locator("#tip").inner_text()
    page.keyboard.press("Enter")
    assert page.locator("#choices input").nth(1).is_checked()
    page.keyboard.press("Escape")
    assert not page.locator("#tip").is_visible()
    reached = set()
    page.mouse.click(2, 2)
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.closest('[id]')?.id"))
    assert {"entropy", "importance", "layer-numbers", "choices", "curves", "curves-entropy", "classes-card", "classes"} <= reached


def test_the_classes_can_be_shown_as_differences(open_page, file, recorder):
    page = open_page(file)
    assert page.locator("#classes-scale").inner_text().startswith("0\n")
    page.locator(".switch label").nth(1).click()
    most = float((recorder.by_class[0] - recorder.importance[0]).abs().max())
    low, high = page.locator("#classes-scale").inner_text().split()
    assert low[0] == "\N{MINUS SIGN}"
    assert float(low[1:]) == pytest.approx(most, abs=1e-4)
    assert float(high) == pytest.approx(most, abs=1e-4)


def test_samples_are_texts_and_pictures(open_page, file, recorder):
    page = open_page(file)
    assert page.locator(".expert").count() == EXPERTS
    expert = int(recorder.importance[0].argmax())
    items = page.locator(".expert").first.locator("li")
    for item, sample in zip(items.all(), recorder.top_samples(0, expert), strict=True):
        assert f"{NASTY} {sample.id} " in item.inner_text()
        assert item.locator("data").inner_text() == f"{sample.score:.3f}"
        item.scroll_into_view_if_needed()
        image = item.locator("img")
        wait_until(page, lambda image=image: image.evaluate("image => image.naturalWidth === 30"))


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_and_all_text_can_be_read(open_page, file, width, scheme):
    page = open_page(file, width, scheme)
    page.locator("#layer-numbers summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    outside = page.evaluate(
        """width => [...document.querySelectorAll("header *, main *")].filter((e) => {
          const box = e.getBoundingClientRect();
          return box.width && !e.closest(".cells, .scroll, .choices") && (box.left < -1 || box.right > width + 1);
        }).map((e) => e.outerHTML.slice(0, 80))""",
        width,
    )
    assert outside == []
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 100
    assert [found for found in contrasts if found[0] < 4.5] == []
    assert len({text for _, text in contrasts} & {"Entropy per layer", "expert 0", "layer 3", "balance"}) == 4


def test_a_window_made_narrower_is_drawn_again(open_page, file):
    page = open_page(file)
    page.set_viewport_size({"width": 400, "height": 800})
    wait_until(page, lambda: page.evaluate("document.querySelector('#entropy svg').clientWidth < 380"))
    assert page.evaluate("document.documentElement.scrollWidth") == 400


@pytest.mark.slow
def test_many_layers_experts_and_classes(open_page, tmp_path):
    recorder = Recorder(class_names=[f"class {c}" for c in range(300)])
    recorder.update((torch.randn(48, 600, 256) * 3).softmax(-1), torch.arange(600) % 300)
    page = open_page(recorder.report(tmp_path / "report.html"), 400)
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    page.locator("#choices input").nth(47).check(force=True)
    assert page.locator(".expert").count() == 16
    page.locator("#more").click()
    assert page.locator(".expert").count() == 256
    page.locator("#importance .cells").focus()
    for _ in range(46):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    chosen = page.locator("#choices input:checked")
    assert chosen.get_attribute("value") == "45"
    assert 0 < chosen.bounding_box()["x"] < 360
    for _ in range(46):
        page.keyboard.press("ArrowUp")
    for _ in range(59):
        page.keyboard.press("ArrowRight")
    assert page.locator("#tip").inner_text().startswith("layer 0, expert 59\n")
    assert page.evaluate("document.querySelector('#importance .cells').scrollLeft") > 100


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 3, 2)])
def test_one_forward_without_classes_and_samples(open_page, tmp_path, sizes):
    recorder = Recorder()
    recorder.update(torch.rand(sizes))
    page = open_page(recorder.report(tmp_path / "report.html"))
    assert not page.locator("#classes-card").is_visible()
    assert not page.locator("#curves-card").is_visible()
    assert page.locator(".expert").count() == sizes[2]


def test_paper_is_white_and_its_charts_fit(open_page, file):
    page = open_page(file, scheme="dark")
    cells = "document.querySelector('#classes .cells').clientWidth"
    page.evaluate(f"addEventListener('beforeprint', () => {{ window.printed = {cells} }})")
    page.pdf()
    assert 300 < page.evaluate("window.printed") < 700
    assert page.evaluate(cells) > 700
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("#more").is_visible()
    assert [found for found in page.evaluate(CONTRASTS) if found[0] < 4.5] == []
