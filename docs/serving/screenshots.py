"""Draw the screenshots of docs/serving.md anew: `python docs/serving/screenshots.py URL` with a server at URL.

The steering file is from a run of three minutes on two CPU cores, on 24 questions that a pirate answers:

    jaxsteer sft jsonl --task.train docs/serving/pirate.jsonl --task.chat --task.max-new-tokens 60 \
        --model smollm2-135m-instruct --optim.lr 5e-3 --epochs 10 --batch-size 4 --sequence-length 128 --out runs/pirate
    jaxsteer serve pirate=runs/pirate
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

FOLDER = Path(__file__).resolve().parent
SCREENS = {"wide": (1400, 900, 1), "narrow": (390, 844, 2)}
"""Width and height in CSS pixels, and device pixels in one of them."""
MESSAGE = "Why do the tides rise and fall?"
COLOURS = 256
"""Number of colours in a screenshot; with more, files are larger and look the same."""


def main(url: str) -> None:
    """Draw all screenshots."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name in SCREENS:
            for scheme in ("light", "dark"):
                _visit(browser, url, name, scheme)
        browser.close()


def _visit(browser: Browser, url: str, name: str, scheme: str) -> None:
    """A message, a weaker dial, a token: the top of the page, and on a narrow screen what steering did as well."""
    width, height, scale = SCREENS[name]
    page = browser.new_page(
        viewport={"width": width, "height": height},
        color_scheme="dark" if scheme == "dark" else "light",
        device_scale_factor=scale,
        reduced_motion="reduce",
    )
    page.goto(url)
    page.locator("#adapter option").first.wait_for(state="attached")
    page.get_by_role("textbox", name="Message", exact=True).fill(MESSAGE)
    page.keyboard.press("Enter")
    tokens = page.get_by_role("listbox", name="Tokens of prompt and answer").get_by_role("option")
    tokens.first.wait_for(timeout=300_000)
    page.locator("#stop").wait_for(state="hidden", timeout=300_000)
    if name == "wide":
        page.get_by_role("slider").first.fill("0.6")
        page.get_by_role("button", name="Answer at").click()
        page.locator("#stop").wait_for(state="hidden", timeout=300_000)
        page.get_by_role("group", name="Steered answers").get_by_role("button").first.click()
    tokens.filter(has_text="Arr").first.click(timeout=300_000)
    page.evaluate("scrollTo(0, 0)")
    _save(page, f"{name}_{scheme}")
    if name == "narrow":
        page.locator(".effects").evaluate("each => scrollTo(0, each.offsetTop - 64)")
        _save(page, f"effects_{scheme}")
    page.close()


def _save(page: Page, name: str) -> None:
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(FOLDER / f"page_{name}.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
