"use strict";

// Charts, one after the other, each in the place of its picture. `ast` interprets Vega's expressions, so that no text is ever evaluated as code, which the
// page's policy would refuse anyway.
async function draw() {
  const specs = JSON.parse(document.getElementById("charts").textContent);
  for (const [id, spec] of Object.entries(specs)) {
    const chart = document.getElementById(id);
    try {
      await vegaEmbed(chart, spec, { renderer: "svg", actions: false, ast: true });
    } catch (error) {
      chart.textContent = `no chart: ${error.message}`;
    }
  }
}
draw();
