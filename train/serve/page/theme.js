// Before the page is drawn, so that it does not flash in the other theme.
{
  const kept = localStorage.getItem("jaxsteer.theme");
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
}
