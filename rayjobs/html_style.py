"""Style and behaviour of the report page: light and dark by the reader's setting, sortable tables, themed figures."""

from __future__ import annotations

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1c2430; --dim: #5b6675; --line: #d9dee5; --head: #f3f5f8;
  --accent: #1d63b8; --good: #1f7a3d; --bad: #b3261e; --stripe: #fafbfc; --grid: #e4e8ee; }
@media (prefers-color-scheme: dark) { :root { --page: #14181f; --text: #e3e8ef; --dim: #9aa5b4; --line: #303846;
  --head: #1d232d; --accent: #7ab4f5; --good: #6fcf8b; --bad: #f28b82; --stripe: #181d25; --grid: #2b3340; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 3vw, 2.5rem) 4rem; max-width: 1400px; background: var(--page);
  color: var(--text); font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { margin: 0 0 .75rem; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 2.75rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); font-size: 1.25rem; }
h3 { margin: 1.5rem 0 .5rem; font-size: 1.02rem; overflow-wrap: anywhere; }
p { max-width: 85ch; }
a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; margin: 1rem 0 0; font-size: .93rem; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .15rem 1.1rem; margin: 0;
  font-size: .93rem; }
dt { color: var(--dim); }
dd { margin: 0; overflow-wrap: anywhere; }
.legend, figcaption, .caption { color: var(--dim); font-size: .88rem; }
.legend { max-width: none; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
thead th { background: var(--head); text-align: right; vertical-align: bottom; }
th:first-child, td:first-child { position: sticky; left: 0; text-align: left; background: var(--page); }
thead th:first-child { background: var(--head); }
tbody tr:nth-child(even) td { background: var(--stripe); }
td.text, th.text { text-align: left; }
td.wrap { white-space: normal; min-width: 9.5rem; }
td.long { min-width: 18rem; }
td.best { font-weight: 700; }
tr.baseline td { color: var(--accent); }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:hover, th button:focus-visible { color: var(--accent); text-decoration: underline; }
th[aria-sort=ascending] button::after { content: " \\25B2"; font-size: .7em; }
th[aria-sort=descending] button::after { content: " \\25BC"; font-size: .7em; }
.holds { color: var(--good); font-weight: 600; }
.reversed, .failed { color: var(--bad); font-weight: 600; }
.plot { width: 100%; min-width: 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 1rem 1.5rem; }
.pair > * { min-width: 0; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 1rem; }
figure { margin: 0; min-width: 0; }
figure.large { grid-column: 1 / -1; }
figure img { display: block; max-width: 100%; border: 1px solid var(--line); border-radius: 6px; background: #ffffff;
  cursor: zoom-in; }
figure.large img { cursor: zoom-out; }
pre { overflow-x: auto; padding: .8rem 1rem; border-radius: 8px; background: var(--head); font-size: .82rem; }
summary { cursor: pointer; color: var(--accent); }
"""

SCRIPT = """
"use strict";
function colour(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }
function themed(figure, width) {
  const text = colour("--text"), grid = colour("--grid"), clear = "rgba(0,0,0,0)";
  const axis = { gridcolor: grid, zerolinecolor: grid, linecolor: grid, automargin: true };
  const layout = { margin: { l: 60, r: 20, t: 40, b: 50 }, ...figure.layout, paper_bgcolor: clear, plot_bgcolor: clear,
    font: { color: text, size: 13, family: "system-ui, -apple-system, Segoe UI, Roboto, Noto Sans, sans-serif" },
    hoverlabel: { namelength: -1 }, modebar: { bgcolor: clear, color: colour("--line"), activecolor: text } };
  layout.xaxis = { ...axis, ...(figure.layout.xaxis || {}) };
  layout.yaxis = { ...axis, ...(figure.layout.yaxis || {}) };
  layout.legend = width < 700 ? { orientation: "h", y: -0.3, yanchor: "top" } : { bgcolor: clear };
  layout.updatemenus = (figure.layout.updatemenus || []).map(menu =>
    ({ ...menu, bgcolor: colour("--head"), bordercolor: colour("--line"), font: { color: text } }));
  const data = figure.data.map(trace => trace.type !== "parcoords" ? trace : { ...trace,
    labelfont: { color: text, size: 13 }, tickfont: { color: text, size: 11 }, rangefont: { color: clear },
    unselected: { line: { color: grid, opacity: 0.35 } } });
  return { data, layout };
}
function draw() {
  for (const div of document.querySelectorAll(".plot")) {
    const figure = JSON.parse(document.getElementById(div.id + "-data").textContent);
    const { data, layout } = themed(figure, div.clientWidth);
    Plotly.react(div, data, layout, { responsive: true, displaylogo: false, showSendToCloud: false,
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"] });
  }
}
function sortBy(button) {
  const head = button.closest("th"), table = button.closest("table"), body = table.tBodies[0];
  const column = head.cellIndex, up = head.getAttribute("aria-sort") === "descending";
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return up ? order : -order;
  });
  body.append(...rows);
}
document.addEventListener("click", event => {
  const button = event.target.closest("th button"), picture = event.target.closest("figure img");
  if (button) sortBy(button);
  if (picture) picture.closest("figure").classList.toggle("large");
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
"""
