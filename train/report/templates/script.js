// Shows the values under the pointer below a chart; without it, they are in the browser's own tooltips.
for (const chart of document.querySelectorAll(".chart")) {
  const readout = chart.querySelector(".readout");
  const show = (event) => {
    const strip = event.target.closest(".strip");
    if (strip) readout.textContent = strip.querySelector("title").textContent;
  };
  chart.addEventListener("pointerover", show);
  chart.addEventListener("pointerdown", show);
  chart.addEventListener("pointerleave", () => { readout.textContent = ""; });
}
// Paper shows everything.
addEventListener("beforeprint", () => {
  for (const closed of document.querySelectorAll("details.run")) closed.open = true;
});
