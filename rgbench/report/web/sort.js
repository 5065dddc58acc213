"use strict";
// Sorting: a button in each head, best first at the first press; missing values stay last, equal ones keep their
// order. A metric with a target is ordered by the distance to it.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const rows = [...body.rows];
  if (rows.length < 2) continue;
  const sort = (i, order, target) => {
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    heads[i].setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    body.append(...[...rows].sort((a, b) => compare(a.cells[i], b.cells[i], sign, target)));
  };
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
      sort(i, order, target);
      if (table.dataset.view) keep(`${table.dataset.view}.sort`, `${i} ${order}`);
    });
    const [place, order] = (VIEW.get(`${table.dataset.view}.sort`) || "").split(" ");
    if (place === String(i)) sort(i, order === "ascending" ? order : "descending", target);
  });
  if (table.dataset.view && heads.length > 3) chooseColumns(table, heads);
}

// Columns: a box each; those without a tick are hidden.
function chooseColumns(table, heads) {
  const box = node("details", "columns");
  const name = `${table.dataset.view}.hide`;
  const hidden = new Set((VIEW.get(name) || "").split(" ").filter(Boolean).map(Number));
  box.append(node("summary", "", "Columns"));
  const apply = (i) => [...table.rows].forEach((row) => (row.cells[i].hidden = hidden.has(i)));
  heads.slice(1).forEach((head, j) => {
    const [i, label, tick] = [j + 1, node("label"), node("input")];
    tick.type = "checkbox";
    tick.checked = !hidden.has(i);
    tick.addEventListener("change", () => {
      hidden[tick.checked ? "delete" : "add"](i);
      apply(i);
      keep(name, [...hidden].join(" "));
    });
    label.append(tick, ` ${(head.querySelector(".h") || head).textContent}`);
    box.append(label);
    apply(i);
  });
  table.closest("figure").querySelector("figcaption").after(box);
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
