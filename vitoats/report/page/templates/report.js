"use strict";
// Draws the charts, in the colours of the page's styles, and again when these change between light and dark.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");

  function theme() {
    const style = getComputedStyle(document.documentElement);
    const one = (name) => style.getPropertyValue(name).trim();
    const many = (name) => one(name).split(/\s+/);
    const [text, muted, grid, line] = ["--text", "--muted", "--grid", "--line"].map(one);
    const font = getComputedStyle(document.body).fontFamily;
    return {
      background: "transparent",
      font,
      padding: { left: 2, right: 8, top: 6, bottom: 2 },
      view: { stroke: "transparent" },
      axis: {
        labelColor: muted, titleColor: muted, gridColor: grid, domainColor: line, tickColor: line,
        labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500, titlePadding: 8,
      },
      legend: {
        orient: "bottom", direction: "horizontal", columns: innerWidth < 600 ? 1 : 2, labelColor: text, titleColor: muted,
        labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500, labelLimit: 260, symbolSize: 80, gradientLength: 180,
        gradientThickness: 10,
      },
      range: { category: many("--series"), heatmap: many("--ramp"), ramp: many("--ramp") },
      line: { color: many("--series")[0] },
      point: { color: many("--series")[0] },
    };
  }

  async function draw() {
    const config = theme();
    for (const chart of document.querySelectorAll(".chart")) {
      const spec = JSON.parse(document.getElementById(chart.dataset.spec).textContent);
      chart.view?.finalize();
      const { view } = await vegaEmbed(chart, { ...spec, width: "container", autosize: { type: "fit-x", contains: "padding" }, config }, {
        actions: false, ast: true, renderer: "svg", defaultStyle: false, tooltip: { disableDefaultStyle: true },
      });
      chart.view = view;
    }
    document.documentElement.dataset.drawn = "yes";
  }

  dark.addEventListener("change", draw);
  draw();
})();
