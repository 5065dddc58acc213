"use strict";
// The page's data, and how its parts are made; text from result files is only ever set as text.
const DATA = JSON.parse(document.getElementById("data").textContent);
document.documentElement.classList.add("js");

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
