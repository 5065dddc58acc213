"use strict";
// Sorting: a button in each head, best first at the first press; missing values stay last, equal ones keep their
// order. A metric with a target is ordered by the distance to it.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const rows = [...body.rows];
  if (rows.length < 2) continue;
  heads.forEach((head, i) => {
    const label = head.querySelector(".h") || head;
    const arrow = head.dataset.arrow || "";
    const target = arrow.startsWith("→") ? Number(arrow.slice(1)) : null;
    const [first, then] = arrow.startsWith("↑") ? ["descending", "ascending"] : ["ascending", "descending"];
    const button = document.createElement("button");
    button.type = "button";
    button.append(...label.childNodes);
    label.append(button);
    button.addEventListener("click", () => {
      const order = head.getAttribute("aria-sort") === first ? then : first;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      body.append(...[...rows].sort((a, b) => compare(a.cells[i], b.cells[i], sign, target)));
    });
  });
}

function compare(a, b, sign, target) {
  const [x, y] = [key(a, target), key(b, target)];
  if (x === null || y === null) return (x === null) - (y === null);
  return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y)));
}

function key(cell, target) {
  if (cell.dataset.n !== undefined) return target === null ? Number(cell.dataset.n) : Math.abs(Number(cell.dataset.n) - target);
  const text = cell.textContent.trim();
  return text === "—" ? null : text;
}

// A link to something folded away opens it.
function unfold() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  for (let box = target.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
  target.scrollIntoView({ block: "center" });
}
addEventListener("hashchange", unfold);
if (location.hash) unfold();
