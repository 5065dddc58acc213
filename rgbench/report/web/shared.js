"use strict";
// The page's data, and how its parts are made; text from result files is only ever set as text.
const DATA = JSON.parse(document.getElementById("data").textContent);
document.documentElement.classList.add("js");

// A link to a view keeps it: what is chosen stands behind "#~".
const VIEW = new URLSearchParams(location.hash.startsWith("#~") ? location.hash.slice(2) : "");
addEventListener("hashchange", () => location.hash.startsWith("#~") && location.reload());

function keep(name, value) {
  if (value) VIEW.set(name, value);
  else VIEW.delete(name);
  history.replaceState(null, "", `#~${VIEW}`);
}

function picture(number) {
  return DATA.images[number] || document.querySelector(`img[data-i="${number}"]`).src;
}

function node(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function shape(tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// What was opened stays open; a link to something folded away opens it.
const PARTS = [...document.querySelectorAll("details.part")];
for (const part of PARTS) {
  part.open = (VIEW.get("open") || "").split(" ").includes(part.id);
  part.addEventListener("toggle", () => keep("open", PARTS.filter((one) => one.open).map((one) => one.id).join(" ")));
}

function unfold() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  for (let box = target.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
  target.scrollIntoView({ block: "center" });
}
addEventListener("hashchange", unfold);
if (location.hash) unfold();

// The first plot: a model's images beside its point.
for (const plot of document.querySelectorAll(".first .plot")) {
  const tip = plot.querySelector(".tip");
  plot.querySelector("svg").setAttribute("role", "group");
  DATA.worlds[plot.dataset.world].points.forEach((point, i) => {
    const mark = document.getElementById(`${plot.dataset.world}-answer-point-${i}`);
    if (!mark) return;
    mark.setAttribute("tabindex", "0");
    mark.setAttribute("role", "img");
    mark.setAttribute("aria-label", [point.name, ...point.values].join(", "));
    const show = () => {
      const images = node("p", "pictures");
      for (const number of point.images) {
        const image = node("img");
        image.src = picture(number);
        image.alt = "";
        images.append(image);
      }
      tip.replaceChildren(node("p", `m m-${point.method}`, point.name), node("p", "sub", point.about), ...point.values.map((value) => node("p", "", value)), images);
      const [box, at] = [plot.getBoundingClientRect(), mark.getBoundingClientRect()];
      tip.hidden = false;
      tip.style.left = `${Math.max(0, Math.min(at.right - box.left + 8, box.width - tip.offsetWidth))}px`;
      tip.style.top = `${at.bottom - box.top + 8}px`;
    };
    const hide = () => (tip.hidden = true);
    for (const name of ["mouseenter", "focus"]) mark.addEventListener(name, show);
    for (const name of ["mouseleave", "blur"]) mark.addEventListener(name, hide);
    mark.addEventListener("keydown", (event) => event.key === "Escape" && hide());
  });
}
