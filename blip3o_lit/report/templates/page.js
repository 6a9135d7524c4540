"use strict";
(() => {
  const { specs, themes } = JSON.parse(document.getElementById("charts").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const status = document.getElementById("status");

  function draw() {
    for (const place of document.querySelectorAll("[data-chart]")) {
      const options = {
        mode: "vega-lite",
        renderer: "svg",
        actions: false,
        ast: true,
        config: dark.matches ? themes.dark : themes.light,
        tooltip: { theme: dark.matches ? "dark" : "light" },
      };
      window.vegaEmbed(place, specs[place.dataset.chart], options).catch((error) => {
        place.textContent = "This chart could not be drawn: " + error.message;
        console.error(error);
      });
    }
  }

  function sort(button) {
    const heading = button.closest("th");
    const table = button.closest("table");
    const column = Number(button.dataset.column);
    const rising = heading.getAttribute("aria-sort") === "descending";
    for (const other of table.querySelectorAll("th[aria-sort]")) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const key = (row) => row.children[column].dataset.value;
    const compare = (first, second) => {
      const a = key(first);
      const b = key(second);
      if (a === "" || b === "") return (a === "") - (b === "");
      const numeric = Number(a) - Number(b);
      const order = Number.isNaN(numeric) ? a.localeCompare(b) : numeric;
      return rising ? order : -order;
    };
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(compare));
    status.textContent = `Sorted by ${button.textContent}, ${rising ? "ascending" : "descending"}`;
  }

  async function copy(button) {
    const source = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(source.textContent);
      status.textContent = "Copied";
      button.classList.add("done");
      setTimeout(() => button.classList.remove("done"), 1500);
    } catch {
      window.getSelection().selectAllChildren(source);
      status.textContent = "Selected: copy it with the keyboard";
    }
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button && button.dataset.column) sort(button);
    if (button && button.dataset.copy) copy(button);
  });
  dark.addEventListener("change", draw);
  draw();
})();
