"use strict";
// Sorting: a button in each head; missing figures stay last, equal ones keep their order.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const rows = [...body.rows];
  if (rows.length < 2) continue;
  heads.forEach((head, i) => {
    const label = head.querySelector(".h") || head;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...label.childNodes);
    label.append(button);
    button.addEventListener("click", () => {
      const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      body.append(...[...rows].sort((a, b) => compare(a.cells[i], b.cells[i], sign)));
    });
  });
}

function compare(a, b, sign) {
  const [x, y] = [key(a), key(b)];
  if (x === null || y === null) return (x === null) - (y === null);
  return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y)));
}

function key(cell) {
  if (cell.dataset.n !== undefined) return Number(cell.dataset.n);
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
