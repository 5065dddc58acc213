"use strict";
// Prompts: every kept prompt with all models' images, filtered by words and group, in the order asked for.
const PER_LOOK = 12;

for (const box of document.querySelectorAll(".browse")) {
  const data = DATA.worlds[box.dataset.world].prompts;
  const controls = box.querySelector("form").elements;
  const list = box.querySelector(".grid");
  const more = box.querySelector(".more");
  let found = [];
  let shown = 0;

  const update = () => {
    const words = controls.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const group = controls.group.value;
    found = data.prompts.filter((prompt) => {
      const text = `${prompt.text} ${prompt.id}`.toLowerCase();
      return (!group || prompt.group === group) && words.every((word) => text.includes(word));
    });
    order(found, data, controls);
    list.replaceChildren();
    shown = 0;
    look();
  };

  const look = () => {
    const next = found.slice(shown, shown + PER_LOOK);
    for (const prompt of next) list.append(promptLine(prompt, data, Number(controls.metric.value)));
    shown += next.length;
    box.querySelector(".count").textContent =
      found.length === 0 ? "No prompt matches." : `${shown} of ${found.length} prompts shown`;
    more.hidden = shown >= found.length;
  };

  const named = [...controls].filter((control) => control.name);
  for (const control of named) {
    const name = `${box.dataset.world}.${control.name}`;
    if (VIEW.has(name)) control.value = VIEW.get(name) === "-" ? "" : VIEW.get(name);
    control.addEventListener("input", () => keep(name, control.value || "-"));
  }
  box.querySelector("form").addEventListener("input", update);
  box.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", look);
  update();
}

// Sorts in place: "" keeps the evaluation's order; a prompt without a score is last.
function order(prompts, data, controls) {
  const [way, metric, model] = [controls.order.value, Number(controls.metric.value), Number(controls.model.value)];
  if (!way || !data.metrics.length) return;
  const what = data.metrics[metric];
  const good = (score) => {
    if (!score) return null;
    const [value] = score;
    if (what.direction === "reference") return -Math.abs(value);
    return what.direction === "higher" ? value : -value;
  };
  const key = (prompt) => {
    const own = good(prompt.scores[metric][model]);
    if (way !== "drop") return own;
    const base = data.base === null ? null : good(prompt.scores[metric][data.base]);
    return own === null || base === null ? null : own - base;
  };
  const sign = way === "best" ? -1 : 1;
  prompts.sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (x - y);
  });
}

function promptLine(prompt, data, chosen) {
  const items = data.models.map((model, i) => {
    const scores = prompt.scores.map((models) => (models[i] ? models[i][1] : ""));
    const about = scores.filter(Boolean).join(" · ");
    return { src: picture(prompt.images[i]), model, about, score: scores[chosen], alt: `${model.name}: ${prompt.text}` };
  });
  const group = prompt.group ? `, ${prompt.group}` : "";
  return line(prompt.text, `${prompt.id}, seed ${prompt.seed}${group}`, items);
}

function line(text, about, items) {
  const figure = node("figure", "line");
  const caption = node("figcaption");
  caption.append(node("span", "prompt", text), " ", node("span", "sub", about));
  const list = node("ul");
  for (const item of items) {
    const entry = node("li");
    entry.dataset.about = item.about || "";
    const label = node("span", "lab");
    label.append(node("span", `m m-${item.model.method}`, item.model.name), " ", node("span", "sub", item.model.about || ""));
    entry.append(label);
    if (item.src) {
      const image = node("img");
      image.src = item.src;
      image.alt = item.alt;
      entry.append(image);
    } else {
      entry.append(node("span", "none", "—"));
    }
    if (item.score) entry.append(node("span", "score", item.score));
    list.append(entry);
  }
  figure.append(caption, list);
  openable(figure);
  return figure;
}
