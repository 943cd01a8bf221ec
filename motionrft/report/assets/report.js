// Theme switch and charts. Charts take their colours from the page, so that they follow the theme.
(() => {
  "use strict";
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  if (button) button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; paint(); });

  const charts = [...document.querySelectorAll(".chart")];
  function themed(layout) {
    const style = getComputedStyle(root);
    const get = (name) => style.getPropertyValue(name).trim();
    const axis = { gridcolor: get("--rule"), linecolor: get("--rule"), tickcolor: get("--rule"), automargin: true };
    return {
      ...layout,
      autosize: true,
      font: { family: style.fontFamily, size: 12, color: get("--muted") },
      hoverlabel: { bgcolor: get("--card"), bordercolor: get("--rule"), font: { color: get("--ink") } },
      xaxis: { ...layout.xaxis, ...axis },
      yaxis: { ...layout.yaxis, ...axis },
    };
  }
  function paint() {
    if (!window.Plotly) return;
    for (const chart of charts) {
      const figure = JSON.parse(chart.querySelector("script").textContent);
      const target = chart.querySelector(".plot");
      window.Plotly.react(target, figure.data, themed(figure.layout), { responsive: true, displayModeBar: false });
    }
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  paint();
})();
