"""The page in a browser: headless Chromium against a server with a tiny model."""

import json
import re
import shutil

import pytest
from page_visit import CONTRASTS, NAMELESS, TWICE, Visit, fails, letters_server, streams
from tiny_server import eventually, held, idle

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("page")]

WIDE, NARROW = {"width": 1400, "height": 900}, {"width": 380, "height": 800}
CHAT = "**/v1/chat/completions"


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    with letters_server(tmp_path_factory.mktemp("page")) as letters:
        yield letters


@pytest.fixture(scope="module")
def browser():
    """Chromium of the system, or else the one that `playwright install chromium` brought."""
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visits(browser, letters):
    """Opens the page; at the end, nothing may have been complained about and nothing asked of another origin."""
    made = []

    def visit(viewport=WIDE, **settings):
        context = browser.new_context(viewport=viewport, reduced_motion="reduce", **settings)
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=letters.url)
        one = Visit(context.new_page())
        one.page.set_default_timeout(60_000)  # a program may have to be compiled
        one.page.on("console", lambda said: one.faults.append(said.text) if said.type in ("error", "warning") else None)
        one.page.on("pageerror", lambda error: one.faults.append(str(error)))
        one.page.on("request", one.saw)
        one.page.goto(letters.url)
        one.page.locator("#adapter option").first.wait_for(state="attached")
        made.append(one)
        return one

    yield visit
    for one in made:
        one.page.context.close()
    assert [fault for one in made for fault in one.faults] == []
    assert set().union(*(one.origins for one in made)) <= {letters.url.split("/")[2]}


@pytest.fixture
def visit(visits):
    return visits()


def test_both_models_answer_and_a_dial_changes_the_steered_answer(visit):
    assert visit.page.get_by_text("Send a message to see the base and the steered model").is_visible()
    visit.send("abc")
    base, steered = visit.answers()
    assert base
    assert steered
    assert base != steered
    visit.strength("All slots", 0)
    visit.again()
    assert visit.answers() == [base, base]  # strength 0 is the base model
    visit.strength("All slots", 0.5)
    visit.again()
    assert visit.answers()[1] not in (base, steered)
    chips = visit.page.get_by_role("group", name="Steered answers").get_by_role("button")
    assert [re.findall(r"[\d.]+", chip.inner_text())[0] for chip in chips.all()] == ["1.00", "0.00", "0.50"]
    chips.first.click()
    assert visit.answers() == [base, steered]


def test_each_slot_has_a_dial(visit):
    visit.strength("up", 0.25)
    assert visit.page.locator(".dial.all output").inner_text() == "mixed"
    visit.send("abc")
    strengths = [body.get("steering_strength") for body in visit.bodies("chat/completions")]
    assert strengths == [None, {"up": 0.25, "low": 1}]
    visit.page.get_by_role("button", name="Reset").click()
    assert visit.page.locator(".dial output").all_inner_texts() == ["1.00"] * 3


def test_answers_follow_a_dial_on_their_own_if_asked_to(visit):
    visit.send("abc")
    before = visit.answers()
    visit.page.get_by_role("switch").check()
    visit.strength("All slots", 0)
    visit.page.locator(".chip").nth(1).wait_for()
    visit.answered()
    assert visit.answers() == [before[0], before[0]]


def test_each_model_keeps_its_own_history(visit):
    visit.send("abc")
    first = visit.answers()
    visit.send("and now?")
    base, steered = visit.bodies("chat/completions")[2:]
    assert "steering_strength" in steered
    assert "steering_strength" not in base
    for body, answer in zip((base, steered), first, strict=True):
        assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
        assert body["messages"][1]["content"].strip() == answer.strip()


def test_a_token_shows_its_layers_and_what_was_likely_before_and_after(visit):
    visit.send("abc")
    tokens = visit.effects()
    options = tokens.get_by_role("option")
    shades = {option.evaluate("e => getComputedStyle(e).backgroundColor") for option in options.all()}
    assert len(shades) > 3
    options.nth(4).click()
    assert options.nth(4).get_attribute("aria-selected") == "true"
    panel = visit.page.get_by_label("The chosen token")
    assert panel.get_by_text("token 4,").is_visible()
    assert panel.get_by_role("img", name=re.compile("Shift by layer: up to")).is_visible()
    assert panel.locator(".chart g").count() == 3  # layers
    for name in ("Base", "Steered"):
        listed = panel.get_by_role("list", name=f"{name}, likeliest tokens").get_by_role("listitem")
        shares = [float(re.search(r"([\d.]+) %$", item.inner_text())[1]) for item in listed.all()]
        assert len(shares) == 8
        assert shares == sorted(shares, reverse=True)
    options.first.click()
    assert panel.get_by_text("no probability is given to it").is_visible()


def test_tokens_may_be_coloured_by_probability(visit):
    visit.send("abc")
    visit.effects()
    visit.page.get_by_role("radio", name="Probability").check()
    assert visit.page.get_by_role("img", name="Colour scale: change of log-probability, nats").is_visible()
    assert visit.page.locator(".token.negative").count() > 0


def test_the_map_of_layers_and_tokens_is_drawn_and_answers_to_pointer_and_keys(visit):
    visit.send("abc")
    visit.effects()
    canvas = visit.page.get_by_role("img", name=re.compile("^Shift of .* in 3 layers"))
    colours = canvas.evaluate("""canvas => {
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      const seen = new Set();
      for (let i = 0; i < data.length; i += 4) seen.add(data.slice(i, i + 4).join());
      return seen.size;
    }""")
    assert colours > 20
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    visit.page.mouse.move(box["x"] + 5, box["y"] + 5)
    readout = visit.page.locator(".readout")
    assert "token 0, layer 2: shift" in readout.inner_text()
    visit.page.mouse.click(box["x"] + 5, box["y"] + 5)
    canvas.focus()
    visit.page.keyboard.press("ArrowRight")
    visit.page.keyboard.press("ArrowDown")
    assert "token 1, layer 1: shift" in readout.inner_text()
    assert visit.page.locator(".token[aria-selected=true]").evaluate("e => e.id").endswith("-1")


def test_the_keyboard_is_enough(visit):
    page = visit.page
    page.keyboard.type("one")  # the message has the focus from the start
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    visit.answered()
    assert page.locator(".asked").inner_text() == "one\ntwo"
    visit.effects().focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    chosen = page.locator(".token[aria-selected=true]")
    assert chosen.evaluate("e => e.id").endswith("-1")
    assert page.get_by_role("listbox").get_attribute("aria-activedescendant") == chosen.get_attribute("id")
    page.get_by_role("slider", name="All slots").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".dial.all output").inner_text() == "1.05"
    ring = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert ring == "solid"


def test_escape_stops_both_answers(visit, letters):
    with held(letters.engine):
        visit.page.get_by_role("textbox", name="Message", exact=True).fill("abc")
        visit.page.keyboard.press("Enter")
        visit.page.get_by_role("button", name="Stop").wait_for()
        visit.page.keyboard.press("Escape")
        visit.answered()
    assert visit.page.locator(".facts").all_inner_texts() == ["stopped", "stopped"]
    assert visit.page.evaluate("document.activeElement.id") == "message"
    eventually(lambda: idle(letters.engine))  # the server was told


def test_completion_mode_puts_the_text_into_the_template(visit):
    visit.page.get_by_role("radio", name="Completion").check()
    assert visit.page.get_by_label("System message").is_hidden()
    visit.page.get_by_label("Template").fill("Q: {prompt}\nA:")
    visit.page.get_by_text("Sampling").click()
    visit.page.get_by_label("Max tokens").fill("3")
    visit.send("why $& so?")
    sent = visit.bodies("v1/completions")
    assert [body["prompt"] for body in sent] == ["Q: why $& so?\nA:"] * 2
    assert {body["max_tokens"] for body in sent} == {3}
    visit.effects()


def test_settings_out_of_range_are_not_sent(visit):
    visit.page.get_by_text("Sampling").click()
    visit.page.get_by_label("Temperature").fill("-1")
    visit.page.get_by_text("Sampling").click()  # closed again: it opens to show what is wrong
    visit.page.get_by_role("textbox", name="Message", exact=True).fill("abc")
    visit.page.keyboard.press("Enter")
    assert visit.page.get_by_label("Temperature").is_visible()
    assert visit.page.locator(".turn").count() == 0


def test_what_a_model_writes_is_never_markup(visit):
    evil = "<img src=x onerror='window.caught=1'><script>window.caught=1</script>"
    streams(visit, CHAT, "<b>bold</b>", evil)
    visit.send("<i>me</i>")
    assert visit.answers() == ["<b>bold</b>" + evil] * 2
    tokens = visit.effects()
    assert evil[:20] in tokens.inner_text().replace("\n", "")
    assert visit.page.locator(".turn :is(img, script, b, i)").count() == 0
    assert visit.page.evaluate("window.caught") is None


def test_the_servers_errors_are_shown(visit):
    fails(visit, CHAT, 429, "The queue is full.", **{"Retry-After": "3"})
    visit.send("abc")
    alerts = visit.page.locator(".answer .error")
    assert alerts.all_inner_texts() == ["The queue is full. Try again in 3 s."] * 2
    assert len(visit.faults) == 2  # the browser reports each
    visit.faults.clear()
    visit.page.unroute(CHAT)
    for name in ("Base", "Steered"):
        visit.page.get_by_label(f"{name} answer", exact=True).get_by_role("button", name="Answer again").click()
    visit.answered()
    assert all(visit.answers())
    assert visit.page.locator(".answer .error:visible").count() == 0


def test_a_key_is_asked_for_once_and_kept_for_the_tab(visit):
    def route(route):
        if route.request.headers.get("authorization") == "Bearer secret":
            route.continue_()
        else:
            body = json.dumps({"error": {"message": "Give an API key."}})
            route.fulfill(status=401, body=body, content_type="application/json")

    visit.page.route("**/v1/**", route)
    visit.page.get_by_role("textbox", name="Message", exact=True).fill("abc")
    visit.page.keyboard.press("Enter")
    dialog = visit.page.get_by_role("dialog", name="API key")
    dialog.get_by_text("Give an API key.").wait_for()
    dialog.get_by_label("Key").fill("secret")
    visit.page.keyboard.press("Enter")
    visit.answered()
    assert all(visit.answers())
    visit.page.get_by_role("button", name="Copy as curl").click()
    visit.page.get_by_text("Copied", exact=True).first.wait_for()
    command = visit.page.evaluate("navigator.clipboard.readText()")
    assert '-H "Authorization: Bearer $JAXSTEER_API_KEY"' in command
    assert "secret" not in command
    assert len(visit.faults) == 2  # the two refused requests
    visit.faults.clear()


def test_the_conversation_is_exported(visit):
    visit.send("abc")
    visit.effects()
    with visit.page.expect_download() as download:
        visit.page.get_by_role("button", name="Export").click()
    assert re.fullmatch(r"jaxsteer-[\dT-]+\.json", download.value.suggested_filename)
    saved = json.loads(download.value.path().read_text())
    assert saved["settings"]["sampling"] == {"temperature": 0, "top_p": 1, "max_tokens": 8, "seed": 0}
    (message,) = saved["messages"]
    assert message["message"] == "abc"
    assert [message["base"]["text"], message["steered"][0]["text"]] == visit.answers()
    effects = message["steered"][0]["effects"]
    assert len(effects["shift"]) == effects["layers"] == 3
    visit.page.get_by_role("button", name="New").click()
    assert visit.page.locator(".turn").count() == 0


def test_a_narrow_screen_has_all_of_it_without_scrolling_sideways(visits):
    visit = visits(NARROW)
    page = visit.page
    assert page.get_by_role("combobox", name="Adapter").is_hidden()
    page.get_by_role("button", name="Steering and settings").click()
    assert page.get_by_role("combobox", name="Adapter").is_visible()
    visit.strength("All slots", 0.5)
    page.keyboard.press("Escape")
    assert page.get_by_role("combobox", name="Adapter").is_hidden()
    visit.send("a word of " + "great" * 30 + "ness")
    visit.effects()
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
    base, steered = (page.get_by_label(f"{name} answer", exact=True).bounding_box() for name in ("Base", "Steered"))
    assert base["y"] + base["height"] <= steered["y"]  # one below the other
    boxes = [button.bounding_box() for button in page.get_by_role("button").all()]
    assert all(box is None or box["height"] >= 24 for box in boxes)  # large enough for a finger


def test_dark_and_light_follow_the_system_and_the_button(visits):
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    lightness = lambda page: sum(map(int, re.findall(r"\d+", page.evaluate(ground))[:3])) / 3
    dark = visits(color_scheme="dark").page
    assert lightness(dark) < 40
    button = dark.get_by_role("button", name="Dark theme")
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert lightness(dark) > 220
    dark.reload()
    assert lightness(dark) > 220  # remembered
    assert lightness(visits(color_scheme="light").page) > 220


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_on_coloured_tokens_can_be_read(visits, scheme):
    """WCAG AA: a contrast of at least 4.5 on every shade."""
    visit = visits(color_scheme=scheme)
    visit.send("abc")
    visit.effects()
    for by in ("Shift", "Probability"):
        visit.page.get_by_role("radio", name=by).check()
        contrasts = visit.page.evaluate(CONTRASTS)
        assert min(contrasts) >= 4.5


def test_everything_that_can_be_used_has_a_name(visit):
    visit.send("abc")
    visit.effects()
    nameless = visit.page.evaluate(NAMELESS)
    assert nameless == []
    twice = visit.page.evaluate(TWICE)
    assert twice == []
    assert visit.page.locator("html[lang=en]").count() == 1
    for role in ("main", "banner", "complementary", "navigation"):
        assert visit.page.get_by_role(role).first.is_visible()
    assert visit.page.locator("#status[role=status]").inner_text() == "Answers complete"


def test_without_an_adapter_the_base_answers_alone(visit):
    entry = {"id": "tiny", "object": "model", "created": 0, "owned_by": "jaxsteer", "parent": None, "steering": None}
    visit.page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": [entry]}))
    streams(visit, CHAT, "hello")
    visit.page.reload()
    visit.page.get_by_text("Start the server with a steering file").wait_for()
    assert visit.page.get_by_role("combobox", name="Adapter").is_disabled()
    assert visit.page.get_by_role("slider").count() == 0
    visit.send("abc")
    assert visit.page.locator(".answer .text").all_inner_texts() == ["hello"]
    assert visit.bodies("chat/completions")[0]["model"] == "tiny"


def test_what_cannot_be_measured_says_why(visit):
    fails(visit, "**/v1/effects", 400, "'answer' has 900 tokens.")
    visit.send("abc")
    visit.page.get_by_text("'answer' has 900 tokens.").wait_for()
    assert all(visit.answers())
    visit.faults.clear()  # the browser's own report of the 400


def test_a_server_that_is_gone_is_said_to_be(visit):
    visit.page.route("**/v1/models", lambda route: route.abort())
    visit.page.reload()
    alert = visit.page.get_by_role("alert").filter(has_text="cannot be reached")
    alert.wait_for()
    visit.page.unroute("**/v1/models")
    alert.get_by_role("button", name="Try again").click()
    alert.wait_for(state="hidden")
    assert visit.page.get_by_role("combobox", name="Adapter").input_value() == "letters"
    visit.faults.clear()
