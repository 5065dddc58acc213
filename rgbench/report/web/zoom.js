"use strict";
// Zoom: any image of a line opens large; arrow keys go through the line, Escape closes.
const zoom = document.getElementById("zoom");
let zoomed = [];
let zoomedAt = 0;

function openable(line) {
  const images = [...line.querySelectorAll("li img")];
  images.forEach((image, i) => {
    image.tabIndex = i === 0 ? 0 : -1;
    image.setAttribute("role", "button");
    image.addEventListener("click", () => openZoom(line, image));
    image.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        openZoom(line, image);
      } else if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
        event.preventDefault();
        const seen = images.filter((other) => other.offsetParent !== null);
        const next = seen[seen.indexOf(image) + (event.key === "ArrowRight" ? 1 : -1)];
        if (next) next.focus();
      }
    });
  });
}

function openZoom(line, image) {
  zoomed = [...line.querySelectorAll("li img")].filter((other) => other.offsetParent !== null);
  document.getElementById("zoom-prompt").textContent = line.querySelector(".prompt").textContent;
  document.getElementById("zoom-id").textContent = line.querySelector("figcaption .sub").textContent;
  zoom.showModal();
  showZoomed(zoomed.indexOf(image));
}

function showZoomed(i) {
  zoomedAt = (i + zoomed.length) % zoomed.length;
  const image = zoomed[zoomedAt];
  const big = document.getElementById("zoom-image");
  big.src = image.src;
  big.alt = image.alt;
  big.className = image.naturalWidth <= 128 ? "pixels" : "";
  const item = image.closest("li");
  const label = item.querySelector(".lab");
  document.getElementById("zoom-model").textContent = label ? label.textContent.trim() : "";
  document.getElementById("zoom-about").textContent = item.dataset.about || (item.querySelector(".score") || {}).textContent || "";
  document.getElementById("zoom-count").textContent = `${zoomedAt + 1} of ${zoomed.length}`;
}

zoom.addEventListener("keydown", (event) => {
  if (event.key === "ArrowRight") showZoomed(zoomedAt + 1);
  if (event.key === "ArrowLeft") showZoomed(zoomedAt - 1);
});
zoom.addEventListener("click", (event) => {
  if (event.target === zoom) zoom.close();
});
document.getElementById("zoom-next").addEventListener("click", () => showZoomed(zoomedAt + 1));
document.getElementById("zoom-back").addEventListener("click", () => showZoomed(zoomedAt - 1));
document.querySelectorAll("figure.line").forEach(openable);
