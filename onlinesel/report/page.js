"use strict";
// Tables that sort by a click on a column's head and are searched, and values at curves' points.
// Without a script the tables are whole and the points have titles.
for (const table of document.querySelectorAll("table.listing")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const texts = rows.map(row => row.textContent.toLowerCase());
  const bar = document.createElement("p"), field = document.createElement("input");
  const found = document.createElement("span");
  field.type = "search";
  field.placeholder = "Search";
  field.setAttribute("aria-label", "Search " + table.getAttribute("aria-label"));
  found.setAttribute("role", "status");
  bar.className = "search";
  bar.append(field, found);
  table.parentElement.before(bar);
  const search = () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, at) => {
      row.hidden = !words.every(word => texts[at].includes(word));
      shown += !row.hidden;
    });
    found.textContent = shown + " of " + rows.length + " rows";
  };
  field.addEventListener("input", search);
  search();
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const number = head.dataset.kind === "number";
      const before = head.getAttribute("aria-sort");
      const sign = (before ? before === "descending" : !number) ? 1 : -1;
      const value = row => {
        const cell = row.cells[column];
        return number ? parseFloat(cell.dataset.value) : cell.textContent;
      };
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const keys = new Map(rows.map(row => [row, value(row)]));
      rows.sort((one, other) => {
        const a = keys.get(one), b = keys.get(other);
        if (!number) return sign * a.localeCompare(b);
        return isNaN(a) - isNaN(b) || sign * (a - b) || 0;  // what is not known comes last
      });
      body.append(...rows);
      rows.forEach((row, at) => { texts[at] = row.textContent.toLowerCase(); });
    });
  });
}
const tip = document.createElement("div");
tip.className = "shown";
tip.hidden = true;
document.body.append(tip);
for (const spot of document.querySelectorAll("circle.tip")) {
  const title = spot.querySelector("title"), text = title.textContent;
  title.remove();
  spot.setAttribute("aria-label", text);
  spot.addEventListener("pointerenter", () => {
    tip.textContent = text;
    tip.hidden = false;
    const box = spot.getBoundingClientRect();
    const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
    tip.style.left = Math.max(8, left) + "px";
    tip.style.top = Math.max(8, box.top - tip.offsetHeight - 6) + "px";
  });
  spot.addEventListener("pointerleave", () => { tip.hidden = true; });
}
